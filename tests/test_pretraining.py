"""Language models trained from nothing, and models converted, on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic.training.conversion
from moesaic import ffn
from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.ffn.layer import ExpertLayer
from moesaic.models.embedded import LoadedModel, load_model
from moesaic.runs.pretraining import load_pretraining
from moesaic.runs.recipe import packaged_pretrainings
from moesaic.training.pretrain import built, pretrain

SMALL = ["steps=6", "batch_size=2", "length=16", "held_out=2", "domains=lists,say", "warmup=1"]


def said(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert main([*line]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert main([*line]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moesaic: ")
    return error


# -- pre-training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", packaged_pretrainings())
def test_a_recipe_trains_and_its_folder_is_read_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    told = said(capsys, "train", name, *SMALL, f"out={out}")
    assert "held-out loss" in told
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 6
    assert results["held_out"].keys() == {"lists", "say"}
    assert not (out / "checkpoints" / "checkpoint-500").exists()
    table = json.loads(said(capsys, "perplexity", str(out), "length=16", "held_out=2", "--json"))
    for domain, figure in table[str(out)].items():
        assert figure["loss"] == pytest.approx(results["held_out"][domain]["loss"], rel=1e-4)


def test_a_model_is_initialised_as_its_architecture_does() -> None:
    from transformers import AutoTokenizer

    from moesaic import nano

    recipe, tokenizer = load_pretraining("pretrain/smoe-dropout"), AutoTokenizer.from_pretrained(nano.path())
    model = built(recipe, tokenizer)
    for layer in ffn.expert_layers(model).values():
        for parameter in layer.experts.parameters():
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1)
    rmoe = built(load_pretraining("pretrain/rmoe"), tokenizer)
    for name, parameter in rmoe.named_parameters():
        if "projector" in name or "head" in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
    again = built(recipe, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = [*SMALL, "k_min=1", "k_max=16", "save_every=2"]
    whole, parts = (load_pretraining("pretrain/smoe-dropout", [*how, f"out={tmp_path / n}"]) for n in ("a", "b"))
    pretrain(whole, progress=False)
    from moesaic.training import trainer

    seen: list[int] = []
    step = trainer._Stopper.on_step_end

    def stops(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen.append(state.global_step)
        self.requested = state.global_step == 3
        step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Stopper, "on_step_end", stops)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of 6"):
            pretrain(parts, progress=False)
    assert seen == [1, 2, 3]
    assert pretrain(parts, progress=False)["resumed_from_step"] == 3
    models = [ffn.load(tmp_path / name / "model") for name in ("a", "b")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    with pytest.raises(ConfigError, match="holds a finished run"):
        pretrain(parts, progress=False)


def test_a_network_is_slimmed_by_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("smoe-dropout", "mixtral"):
        out = str(tmp_path / name)
        said(capsys, "train", f"pretrain/{name}", *SMALL, f"out={out}")
        found = json.loads(said(capsys, "perplexity", out, "top_k=1,16", "length=16", "held_out=2", "--json"))
        assert found.keys() == {"k=1", "k=16"}
        assert found["k=1"]["lists"]["loss"] != found["k=16"]["lists"]["loss"]
        assert "must be between 1 and 16" in refused(capsys, "perplexity", out, "top_k=17", "length=16")


def test_a_folder_is_the_model_that_was_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    told = said(capsys, "train", "pretrain/smoe-dropout", *SMALL, "k_min=1", "k_max=3", f"out={out}")
    assert f"moesaic perplexity {out} top_k=1,2" in told
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = json.loads(said(capsys, "perplexity", out, "--json"))[out]
    assert found["say"]["loss"] == pytest.approx(results["held_out"]["say"]["loss"], rel=1e-5)
    at_all = json.loads(said(capsys, "perplexity", out, "top_k=16", "--json"))["k=16"]
    assert found["say"]["loss"] != pytest.approx(at_all["say"]["loss"], rel=1e-5)
    assert "16 experts, 3 a token" in said(capsys, "export", out, f"out={tmp_path / 'stock'}")
    assert "moesaic convert cmoe" in refused(capsys, "train", "pretrain/dense", "method=cmoe", f"out={tmp_path / 'b'}")


def test_what_cannot_be_pretrained_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        (["pretrain/dense", "architecture=lama"], "did you mean 'llama'"),
        (["pretrain/dense", "config.num_attention_heads=3"], "architecture llama cannot be made so"),
        (["pretrain/smoe-dropout", "experts.num_experts=7"], "7"),
        (["pretrain/smoe-dropout", "experts.num_expert=8"], "num_expert"),
        (["pretrain/smoe-dropout", "k_schedule=linea"], "unknown schedule 'linea'"),
        (["pretrain/smoe-dropout", "k_max=17"], "top_k=17"),
        (["pretrain/smoe-dropout", "k_min=9", "k_max=8"], "1 <= k_min <= k_max"),
        (["pretrain/dense", "k_schedule=linear"], "no layers made of experts"),
        (["pretrain/dense", "method=rmoe"], "has no routers to link"),
        (["pretrain/dense", "method=read-me"], "made of a trained model"),
        (["pretrain/dense", "config=5"], "config=5 must be settings of its own"),
        (["pretrain/dense", "experts=5"], "experts=5 must be settings of its own"),
        (["pretrain/dense", "experts.num_experts=4"], "experts are settings of a method"),
        (["pretrain/dense", "k_max=7"], "k_min and k_max are ends of a schedule"),
        (["pretrain/smoe-dropout", "experts.top_k=2"], "experts.top_k and k_schedule disagree"),
        (["pretrain/dense", "config.foo=3"], "has no setting config.foo"),
        (["pretrain/dense", "config.vocab_size=3"], "config.vocab_size follows from the tokenizer"),
        (["pretrain/dense", "config.num_key_value_heads=3"], "architecture llama cannot be made so"),
        (["pretrain/dense", "domains=[]"], "domains is empty"),
        (["pretrain/dense", "method=rmeo"], "did you mean 'rmoe'"),
        (["pretrain/dense", "step=5"], "unknown key 'step'"),
        (["pretrain/dens"], "did you mean 'pretrain/dense'"),
        (["pretrain/dense", "length=1024"], "length"),
        (["pretrain/dense", "lr=nan"], "lr"),
    ):
        assert message in refused(capsys, "train", line[0], *SMALL, f"out={tmp_path / 'x'}", *line[1:]), line
    assert not (tmp_path / "x").exists()


def test_what_sees_the_next_token_is_not_trained_to_predict_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
    (tmp_path / "bert.yaml").write_text(f"architecture: bert\nconfig: {size}\n")
    told = refused(capsys, "train", str(tmp_path / "bert.yaml"), *SMALL, f"out={tmp_path / 'x'}")
    assert "attends to what comes after a token" in told
    said(capsys, "train", str(tmp_path / "bert.yaml"), *SMALL, f"out={tmp_path / 'x'}", "config.is_decoder=true")


def test_other_verbs_say_which_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", "pretrain/dense", *SMALL, f"out={tmp_path / 'run'}")
    assert "moesaic perplexity" in refused(capsys, "eval", str(tmp_path / "run"))
    said(capsys, "convert", "smoe-dropout", "model=nano", f"out={tmp_path / 'made'}")
    assert "moesaic perplexity" in refused(capsys, "eval", str(tmp_path / "made"))


# -- conversion ----------------------------------------------------------------------------------------------------

FEW = ["length=32", "rows=4", "held_out=2", "batch_size=2"]
TUNED = ["tune.rounds=2", "tune.router_steps=2", "tune.expert_steps=2", "experts.router_dim=16"]


def converted(capsys: pytest.CaptureFixture[str], out: Path, method: str, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        said(capsys, "convert", method, "model=nano", f"out={out}", *FEW, *more, "--json")
    )
    return found


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("read-me", ["domains=lists,prose", *TUNED]),
        ("read-me", ["domains={a: lists, b: prose}", "tune.rounds=0", "experts.residual=separate", "experts.width=64"]),
        ("cmoe", ["domains=lists,prose", "experts.top_k=3", "dtype=bfloat16"]),
        ("smoe-dropout", ["experts.combine=sum", "domains=lists"]),
        ("smoe-dropout", []),
    ],
)
def test_a_folder_is_converted_and_read_again(
    method: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    results = converted(capsys, out, method, *more)
    assert json.loads((out / "conversion.json").read_text()) == results
    assert "Perplexity" in (out / "report.html").read_text()
    if results["before"]:
        how = ("length=32", "held_out=2")
        table = json.loads(
            said(capsys, "perplexity", "nano", str(out), f"domains={json.dumps(results['domains'])}", *how, "--json")
        )
        for name, key in (("nano", "before"), (str(out), "after")):
            for domain, figure in table[name].items():
                assert figure["loss"] == pytest.approx(results[key][domain]["loss"], rel=1e-4)
    assert "overwrite=true replaces it" in refused(capsys, "convert", method, "model=nano", f"out={out}", *FEW, *more)
    again = converted(capsys, out, method, "overwrite=true", *more)
    assert again["after"] == results["after"]


def test_a_converted_folder_is_trained_and_converted_as_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = tmp_path / "made", tmp_path / "run"
    converted(capsys, made, "smoe-dropout", "experts.num_experts=8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"task": "t", "prompt": "sort 4 1 8 :", "completion": " 1 4 8"}\n' * 8)
    said(capsys, "train", "lora", f"model={made}", f"data={rows}", "steps=2", f"out={run}")
    assert "100.0" in said(capsys, "eval", str(run), f"data={rows}")
    for method in ("smoe-dropout", "cmoe"):
        again = refused(capsys, "convert", method, f"model={made}", "domains=say", f"out={tmp_path / 'x'}", *FEW)
        assert "this model has the layers of smoe-dropout already" in again


def test_models_of_different_tokens_are_compared_in_bits_a_byte() -> None:
    from moesaic.report.tables import perplexity_table

    short = {"a": {"loss": 1.0, "perplexity": 2.72, "bits_per_byte": 0.5}}
    long = {"a": {"loss": 2.0, "perplexity": 7.39, "bits_per_byte": 0.4}}
    for other, title, mean in (
        ({"a": {"loss": 2.0, "perplexity": 7.39, "bits_per_byte": 1.0}}, "perplexity of held-out text", "7.39"),
        (long, "held-out text in bits a byte, as tokenizers differ", "0.40"),
    ):
        table = perplexity_table({"one": short, "other": other})
        assert str(table.title) == title
        assert [*table.columns[2].cells] == [mean, mean]


def interrupted(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> None:
    """Run a conversion that is interrupted in its second round."""
    from moesaic.ffn import tune

    stage, stages = tune.stage, []

    def stops(*args: Any, **kwargs: Any) -> None:
        stages.append(args)
        if len(stages) == 3:
            raise KeyboardInterrupt
        stage(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "stage", stops)
        assert main(line) == 130


def with_other_weights(name: str) -> LoadedModel:
    base = load_model(name)
    base.model.get_input_embeddings().weight.data[5, 0] += 1
    return base


def test_an_interrupted_conversion_goes_on_as_if_it_had_not_been(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = ["domains=lists,prose", *TUNED]
    converted(capsys, tmp_path / "a", "read-me", *line)
    interrupted(monkeypatch, ["convert", "read-me", "model=nano", f"out={tmp_path / 'b'}", *FEW, *line])
    assert "round 1 is kept, and the same command goes on from there" in caplog.text
    assert "no experts.json" not in caplog.text
    assert [p.name for p in (tmp_path / ".b.rounds").glob("[0-9]*")] == ["1"]
    assert not (tmp_path / "b").exists()
    other = refused(capsys, "convert", "read-me", "model=nano", f"out={tmp_path / 'b'}", *FEW, *line, "seed=1")
    assert re.search("unfinished conversion to .*b with seed=0, now 1", other)
    with monkeypatch.context() as patch:
        patch.setattr(moesaic.training.conversion, "load_model", with_other_weights)
        other = refused(capsys, "convert", "read-me", "model=nano", f"out={tmp_path / 'b'}", *FEW, *line)
    assert re.search("unfinished conversion to .*b with the weights of nano=", other)
    converted(capsys, tmp_path / "b", "read-me", *line)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    kept = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert kept[0] == kept[1]


def test_a_mixtral_is_exported_for_those_without_moesaic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, tmp_path / "made", "smoe-dropout", "experts.num_experts=8")
    told = said(capsys, "export", str(tmp_path / "made"), f"out={tmp_path / 'stock'}", "top_k=4")
    assert "8 experts, 4 a token" in told
    probe = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "stock")!r})
assert type(model).__name__ == "MixtralForCausalLM" and not any(m.startswith("moesaic") for m in sys.modules)
print(model(torch.arange(2, 12)[None]).logits.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own = ffn.load(tmp_path / "made")
    for layer in own.modules():
        if isinstance(layer, ExpertLayer):
            layer.top_k = 4
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(own(torch.arange(2, 12)[None]).logits.sum().item(), rel=1e-4)
    assert "converted model is exported whole" in refused(
        capsys, "export", str(tmp_path / "made"), f"out={tmp_path / 'x'}", "expert=a"
    )


def test_a_recurrent_router_is_put_into_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", "pretrain/mixtral", *SMALL, f"out={tmp_path / 'run'}")
    made = ["convert", "rmoe", f"model={tmp_path / 'run' / 'model'}", f"out={tmp_path / 'made'}", "experts.state_dim=8"]
    said(capsys, *made, "domains=lists", "length=16", "held_out=2")
    linked, stock = ffn.load(tmp_path / "made"), AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(linked).__name__ == "MoesaicMixtralForCausalLM"
    for own, theirs in zip(linked.model.layers, stock.model.layers, strict=True):
        assert torch.equal(own.mlp.experts.gate_up_proj, theirs.mlp.experts.gate_up_proj)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "made")).__name__ == "MoesaicMixtralForCausalLM"


def test_what_cannot_be_converted_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for line, message in (
        (["read-me", "model=nano"], "reads text: domains="),
        (["read-me", "model=nano", "domains=lists"], "two domains at least"),
        (["read-me", "model=nano", f"domains=lists,{empty}"], "holds no text"),
        (["read-me", "model=nano", "domains=lists,listz"], "did you mean 'lists'"),
        (["read-me", "model=nano", "domains=lists,say", "experts.width=9999"], "cannot be cut out of 512"),
        (["read-me", "model=nano", "domains=lists,say", "tune.round=1"], "did you mean 'rounds'"),
        (["read-me", "model=nano", "domains=lists,say", "tune.loss=x"], "loss='x'"),
        (["read-me", "model=nano", "domains=lists,say", "experts.heads=1"], "no setting experts.heads"),
        (["read-me", "domains=lists,say"], "model is missing"),
        (["read-me", "model=minilm", "domains=lists,say"], "is an encoder"),
        (["cmoe", "model=nano", "domains=lists", "experts.top_k=9"], "top_k"),
        (["cmoe", "model=nano", "domains=lists", "tune.rounds=1"], "is not trained on conversion"),
        (["smoe-dropout", "model=nano", "experts.num_experts=7"], "7"),
        (["rmoe", "model=nano"], "has no routers to link"),
        (["redme", "model=nano"], "did you mean 'read-me'"),
        (["smoe-dropout", "model=none/such"], "cannot load model"),
        (["smoe-dropout", "model=nano", "length=4"], "length=4 must be at least 8"),
        (["cmoe", "model=nano", "domains=lists", f"batch_size={10**20}"], "must be at most 1,000,000"),
        (["read-me", "model=nano", "domains=lists,say", "experts.router_heads=100000000"], "out of memory"),
        (["read-me", "model=nano", "domains=lists,say", "tune.router_lr=1e38"], "router_lr=1e+38 is above 1"),
    ):
        where = f"out={tmp_path / 'x'}"
        assert message in refused(capsys, "convert", *line, where, *(["rows=2"] if "length=4" not in line else [])), (
            line
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty.txt"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    told = refused(capsys, "convert", "smoe-dropout", "model=nano", f"out={tmp_path / 'full'}", "overwrite=true")
    assert "not a conversion's" in told
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("more", [["model=./made"], ["domains=nosuch"], ["experts.num_experts=3"]])
def test_what_fails_replaces_nothing(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said(capsys, "convert", "smoe-dropout", "model=nano", "out=made")
    before = {file.name: file.read_bytes() for file in Path("made").iterdir()}
    refused(capsys, "convert", "smoe-dropout", "model=nano", "out=made", "overwrite=true", *more)
    assert {file.name: file.read_bytes() for file in Path("made").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_no_folder_is_written_where_none_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for out, message in (("loop", "cannot be written"), ("loop/x", "cannot be written"), (".staging", "name another")):
        assert message in refused(capsys, "convert", "smoe-dropout", "model=nano", f"out={out}"), out
        assert message in refused(capsys, "train", "pretrain/dense", *SMALL, f"out={out}"), out


def test_what_an_interrupt_left_of_a_folder_goes_with_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "convert", "smoe-dropout", "model=nano", f"out={tmp_path / 'made'}")
    (tmp_path / ".trash-made-1").mkdir()
    said(capsys, "convert", "smoe-dropout", "model=nano", f"out={tmp_path / 'made'}", "overwrite=true")
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_tokens_that_a_model_does_not_have_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_model("nano")
    base.model.resize_token_embeddings(100)
    for name, changed in (("small", {}), ("odd", {"hidden_size": "abc"})):
        base.model.save_pretrained(tmp_path / name)
        base.tokenizer.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    for line in (["perplexity", str(tmp_path / "small")], ["convert", "cmoe", f"model={tmp_path / 'small'}"]):
        assert "and the model embeds 100" in refused(capsys, *line, "domains=lists", "length=16")
    told = refused(capsys, "perplexity", str(tmp_path / "odd"), "domains=lists")
    assert "cannot load model" in told
    assert "'hidden_size'" in told


def test_folders_of_others_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rounds", ".git"):
        (tmp_path / name / name).mkdir(parents=True)
        told = refused(capsys, "convert", "smoe-dropout", "model=nano", f"out={tmp_path / name}", "overwrite=true")
        assert "not a conversion's" in told
        assert (tmp_path / name / name).is_dir()
    monkeypatch.chdir(tmp_path)
    assert "the folder that this runs in" in refused(capsys, "convert", "smoe-dropout", "model=nano", "out=.")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    said(capsys, "convert", "smoe-dropout", "model=nano", "out=link")
    assert (tmp_path / "real" / "config.json").is_file()
    assert "lies in a converted model" in refused(capsys, "convert", "smoe-dropout", "model=nano", "out=real/model")


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("smoe-dropout", "experts.combine=foo", "combine='foo' must be one of softmax, sum"),
        ("smoe-dropout", "experts.router=null", "router=None must be one of fixed, learned"),
        ("smoe-dropout", "experts.top_k=1.5", "top_k=1.5 must be a whole number"),
        ("smoe-dropout", "experts.num_experts=true", "num_experts=True must be a whole number"),
        ("cmoe", "experts.top_k=1.5", "top_k=1.5 must be a whole number"),
        ("read-me", "experts.width=abc", "width='abc' must be a whole number"),
        ("read-me", "experts.router_heads=0", "router_heads=0"),
        ("read-me", "tune.router_lr=abc", "router_lr='abc' must be a number"),
        ("read-me", "tune.decay=-1", "decay=-1 must not be negative"),
        ("read-me", "tune.rounds=1.5", "rounds=1.5 must be a whole number"),
        ("rmoe", "experts.recurrence=foo", "recurrence='foo' must be one of full, detach, none"),
        ("rmoe", "experts.residual_alpha=nan", "residual_alpha=nan must be a number"),
        ("cmoe", "domains=5", "domains=5 must be sources of text"),
        ("cmoe", "domains=~nosuchuser/x", "no such user"),
    ],
)
def test_a_setting_is_of_its_kind(
    method: str, setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = [] if setting.startswith("domains") or method in ("smoe-dropout", "rmoe") else ["domains=lists,say"]
    assert message in refused(capsys, "convert", method, "model=nano", f"out={tmp_path / 'x'}", *FEW, *text, setting)
    assert not any(tmp_path.iterdir())


def test_text_that_changed_is_no_unfinished_conversions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} line {i} of a text" for i in range(200)))
    line = ["convert", "read-me", "model=nano", f"out={tmp_path / 'x'}", *FEW, *TUNED]
    line.append(f"domains={tmp_path / 'a.txt'},{tmp_path / 'b.txt'}")
    interrupted(monkeypatch, line)
    (tmp_path / "b.txt").write_text("\n".join(f"quite another line {i}" for i in range(200)))
    assert re.search("with the text of b=[0-9a-f]+, now [0-9a-f]+: set it back", refused(capsys, *line))
    said(capsys, *line, "overwrite=true")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("moesaic"), "config.json is damaged"),
        (lambda c: c["moesaic"].update(more=1), "has no setting more"),
        (lambda c: c["moesaic"].update(num_experts="abc"), "num_experts='abc' must be a whole number"),
        (lambda c: c.update(architectures=[5]), "config.json is damaged"),
        (lambda c: c.update(num_hidden_layers=2), "unexpected keys in its weights"),
        (lambda c: c["moesaic"].update(num_experts=8), "cannot be read|mismatched keys"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    said(capsys, "convert", "smoe-dropout", "model=nano", f"out={made}")
    config = json.loads((made / "config.json").read_text())
    change(config)
    (made / "config.json").write_text(json.dumps(config))
    assert re.search(message, refused(capsys, "perplexity", str(made), "domains=lists", "length=16"))
    assert re.search(message, refused(capsys, "export", str(made), f"out={tmp_path / 'x'}"))


def test_weights_that_are_gone_or_cut_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    made = tmp_path / "made"
    said(capsys, "convert", "smoe-dropout", "model=nano", f"out={made}")
    file = made / "model.safetensors"
    weights = load_file(file)
    lost = weights.pop("model.layers.0.mlp.experts.down_proj")
    save_file(weights, file, metadata={"format": "pt"})
    asked = ["perplexity", str(made), "domains=lists", "length=16"]
    assert "missing keys in its weights, 1, such as model.layers.0.mlp.experts.down_proj" in refused(capsys, *asked)
    assert lost.numel() > 0
    file.write_bytes(file.read_bytes()[:5000])
    assert "cannot be read" in refused(capsys, *asked)
    assert "cannot be read" in refused(capsys, "export", str(made), f"out={tmp_path / 'x'}")


def test_a_model_of_one_expert_a_token_is_not_slimmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, tmp_path / "made", "read-me", "domains=lists,say", "tune.rounds=0", "experts.router_dim=16")
    assert "top_k cannot be set" in refused(capsys, "perplexity", str(tmp_path / "made"), "top_k=2")


def test_perplexity_asks_for_what_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, message in (
        ("length=-5", "length=-5 must be at least 8"),
        ("batch_size=0", "batch_size=0 must be between 1"),
        ("held_out=-1", "held_out=-1 must be at least 1"),
        ("held_out=99999999999", "held_out=99999999999 must be between 1 and 1,000,000"),
        ("top_k=2", "no layers made of experts"),
    ):
        assert message in refused(capsys, "perplexity", "nano", "domains=lists", setting)
