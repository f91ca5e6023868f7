"""`moesaic compare`: the plan that is refused or run, cells as processes, going on where it stopped."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml

from moesaic.cli.main import main
from moesaic.compare import cells
from moesaic.compare.arms import plan
from moesaic.compare.run import run
from moesaic.compare.settings import load
from moesaic.errors import ConfigError, MissingDependency, MoesaicError
from moesaic.models import embedded
from moesaic.runs.recipe import Recipe, adapter_config, load_recipe
from moesaic.training.prepared import load_examples, prepare, training_rows
from moesaic.training.run import build_trainer
from tests.tiny import FROM_SCRATCH
from tests.tiny_folders import write_world

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    return write_world(root)


def settings(world, *more: str, kind: str = "encoder") -> list[str]:
    shared = [f"model={world / kind}", f"data={world / f'{kind}-data'}", f"steps={STEPS}", "batch_size=4", "warmup=1"]
    return [*shared, "threads=1", *more]


def planned(world, *more: str, kind: str = "encoder"):
    return plan(*load(settings(world, *more, kind=kind)))


class Here:
    """Stands for `subprocess.Popen`: the cell's commands, run in this process; those in `broken` end with an error.

    Given a `template`, a finished cell, its files are copied in place of training: for what happens around cells.
    Those of `trial` are, where there is one, for trials.
    """

    broken: tuple[str, ...] = ()
    template: Path | None = None
    trial: Path | None = None
    ran: list[str]

    def __init__(self, command: list[str], *, stdout, **kwargs) -> None:
        assert command[:3] == [sys.executable, "-m", "moesaic.compare.cells"]
        commands = json.loads(command[3])
        folder = Path(commands[0][1])
        Here.ran.append(folder.name)
        text = StringIO()
        with redirect_stdout(text), redirect_stderr(text):
            if folder.name in self.broken:
                print("warning\nmoesaic: out of luck\nmore", file=sys.stderr)
                self.returncode = 2
            elif self.template:
                source = self.trial if self.trial and "-lr" in folder.name else self.template
                for name in ("results.json", "metrics.jsonl", "eval-validation.json", "predictions-validation.jsonl"):
                    shutil.copy(source / name, folder / name)
                self.returncode = 0
            else:
                self.returncode = cells.main(commands)
        stdout.write(text.getvalue().encode())

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error) -> None: ...

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(cells.subprocess, "Popen", Here)
    monkeypatch.setattr(sys, "argv", ["moesaic"])
    monkeypatch.setattr(Here, "broken", ())
    monkeypatch.setattr(Here, "template", None)
    monkeypatch.setattr(Here, "trial", None)
    monkeypatch.setattr(Here, "ran", [], raising=False)
    return Here


@pytest.fixture(scope="module")
def cell(world, tmp_path_factory):
    """A cell that was really trained and scored."""
    out = tmp_path_factory.mktemp("cell")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells.subprocess, "Popen", Here)
        patch.setattr(sys, "argv", ["moesaic"])
        patch.setattr(Here, "ran", [], raising=False)
        assert run(settings(world, "methods=lora", "seeds=0", f"out={out}")) == 0
    return out / "cells" / "lora-s0"


@pytest.fixture
def quick(here, cell, monkeypatch):
    monkeypatch.setattr(Here, "template", cell)
    return here


def read(file: Path):
    return json.loads(file.read_text())


# -- the plan ------------------------------------------------------------------------------------------------------


def test_controls_stand_beside_a_mixture_at_its_scale(world):
    small_routers = ("arms.hotmoe.expert_dim=4", "arms.hotmoe.attention_dim=4")
    found = planned(world, "methods=hotmoe", "adapter.num_experts=3", *small_routers)
    assert list(found.arms) == ["lora", "hotmoe", "uniform", "oracle", "bound"]
    config = {name: adapter_config(arm.recipe, num_tasks=len(found.tasks)) for name, arm in found.arms.items()}
    assert found.arms["hotmoe"].trainable == found.budget
    for name in ("lora", "uniform", "oracle"):
        assert abs(found.arms[name].trainable / found.budget - 1) <= 0.01
    assert config["uniform"].num_experts == config["hotmoe"].num_experts == 3
    assert config["oracle"].num_experts == len(found.tasks) == 2
    for name in ("uniform", "oracle"):
        assert config[name].scaling == pytest.approx(config["hotmoe"].scaling)
    assert found.arms["bound"].recipe.method == "oracle"
    assert config["bound"].r == config["lora"].r
    assert (config["bound"].rank_pattern or {}) == config["lora"].rank_pattern
    assert config["bound"].scaling == pytest.approx(config["lora"].lora_alpha / config["lora"].r)


def test_no_controls_without_a_mixture_or_a_second_task_or_where_they_are_named(world):
    assert list(planned(world, "methods=lora,dora").arms) == ["lora", "dora"]
    assert list(planned(world, "methods=mola", "controls=false").arms) == ["lora", "mola"]
    assert list(planned(world, "methods=mola", "tasks=even").arms) == ["lora", "mola", "uniform"]
    named = planned(world, "methods=lora,mola,uniform", "match=none").arms
    assert list(named) == ["lora", "mola", "uniform", "oracle", "bound"]
    assert named["uniform"].rank == adapter_config(load_recipe("uniform")).r


def test_controls_follow_the_first_that_learns_its_routing(world):
    found = planned(world, "methods=oracle,mola", "adapter.num_experts=5")
    assert (found.arms["uniform"].experts, found.arms["mola"].experts) == (5, 5)
    assert found.budget == found.arms["mola"].trainable


def test_controls_have_the_scale_that_the_mixtures_solved_rank_has(world):
    small_routers = ("arms.hotmoe.expert_dim=4", "arms.hotmoe.attention_dim=4")
    ask = ("budget=lora", "arms.lora.r=40", "arms.hotmoe.use_rslora=true", *small_routers)
    found = planned(world, "methods=hotmoe", *ask)
    assert found.arms["hotmoe"].rank != load_recipe("hotmoe").adapter["r"]
    scale = {
        name: adapter_config(arm.recipe, num_tasks=2).scaling for name, arm in found.arms.items() if name != "lora"
    }
    assert scale["uniform"] == scale["oracle"] == pytest.approx(scale["hotmoe"])


def test_arms_know_which_modules_they_adapt_and_how_experts_are_chosen(world):
    found = planned(world, "methods=lora,mola", "arms.narrow.method=lora", "arms.narrow.target_modules=[query]").arms
    assert found["lora"].modules == found["mola"].modules == found["uniform"].modules != found["narrow"].modules
    assert found["narrow"].modules == "query x 2"
    assert [found[name].kind for name in ("lora", "mola", "uniform", "oracle")] == [
        "plain",
        "learned",
        "fixed",
        "oracle",
    ]


def test_arms_have_settings_of_their_own_and_common_ones_where_they_know_them(world):
    found = planned(
        world, "methods=lora,mola", "arms.mola.top_k=1", "arms.wide.method=mola", "arms.wide.adapter.num_experts=5",
        "adapter.top_k=3", "adapter.lora_dropout=0.25", "adapter.num_experts=4", "controls=false",
    )  # fmt: skip
    assert list(found.arms) == ["lora", "mola", "wide"]
    adapter = {name: arm.recipe.adapter for name, arm in found.arms.items()}
    assert (adapter["mola"]["top_k"], adapter["wide"]["top_k"]) == (1, 3)
    assert (found.arms["mola"].experts, found.arms["wide"].experts) == (4, 5)
    assert {a["lora_dropout"] for a in adapter.values()} == {0.25}
    assert "top_k" not in adapter["lora"]


def test_the_largest_mixture_is_the_measure_unless_another_is_named(world):
    narrow = ("arms.hotmoe.expert_dim=4", "arms.hotmoe.attention_dim=4", "controls=false")
    found = planned(world, "methods=mola,hotmoe", *narrow)
    assert found.arms["hotmoe"].rank == load_recipe("hotmoe").adapter["r"]
    assert found.arms["hotmoe"].trainable > planned(world, "methods=mola", "controls=false").budget
    named = planned(world, "methods=lora,mola", "budget=lora", "arms.lora.r=24", "controls=false")
    assert named.arms["lora"].rank == 24
    assert named.budget == named.arms["lora"].trainable
    assert planned(world, "methods=lora,mola", "budget=2e4", "controls=false").budget == 20000


def test_a_kind_of_initialisation_that_reads_the_weights_can_be_counted_without_them(world):
    found = planned(world, "methods=lora,mola", "arms.lora.init_lora_weights=pissa", "controls=false")
    assert found.arms["lora"].recipe.adapter["init_lora_weights"] == "pissa"
    assert abs(found.arms["lora"].trainable / found.budget - 1) <= 0.01


def test_an_oracle_takes_no_common_number_of_experts(world):
    assert planned(world, "methods=oracle", "adapter.num_experts=5", "match=none").arms["oracle"].experts == 2


def test_equal_ranks_are_experts_times_rank(world):
    found = planned(world, "methods=lora,mola,hotmoe", "match=rank", "adapter.num_experts=3", "controls=false")
    assert {name: arm.experts * arm.rank for name, arm in found.arms.items()} == {"lora": 6, "mola": 6, "hotmoe": 6}
    assert found.budget == 6
    assert all(adapter_config(arm.recipe).lora_alpha / arm.rank in (2, 8) for arm in found.arms.values())


def test_ranks_that_cannot_be_equal_are_shown_to_differ(world, capsys):
    run(settings(world, "methods=lora,mola", "match=rank", "budget=8", "arms.mola.num_experts=3"), dry_run=True)
    shown = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert "+0.00%" in shown["lora"]
    assert "+12.50%" in shown["mola"]


def test_every_arm_sees_the_same_rows_in_the_same_order(world, tmp_path):
    seen = []
    for name, arm in planned(world, "methods=lora,mola", "controls=false", kind="causal").arms.items():
        rows = load_examples(arm.recipe)
        prepared = prepare(arm.recipe, rows)
        folder = cells.RunFolder(tmp_path / name)
        trainer = build_trainer(prepared, rows, training_rows(prepared, rows), folder, progress=False)
        seen.append([batch["input_ids"] for batch in trainer.get_train_dataloader()])
    assert len(seen[0]) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


REFUSED = [
    (["methods=mola", "stps=3"], "unknown key 'stps'; did you mean 'steps'"),
    (["methods=mola", "seed=3"], "unknown key 'seed'; did you mean 'seeds'"),
    ([], "methods is missing"),
    (["methods=molla"], "no method 'molla'; did you mean 'mola'"),
    (["methods=mola,mola"], "methods=mola,mola names one twice"),
    (["methods=mola", "seeds=1,1"], "seeds=1,1 names one twice"),
    (["methods=mola", "seeds=-1"], "seeds and tune_seed must be between 0"),
    (["methods=mola", "lrs=0.1,-1"], "must be finite numbers above 0"),
    (["methods=mola", "match=params"], "match=params; "),
    (["methods=mola", "engine=cloud"], "engine=cloud; "),
    (["methods=mola", "split=tset"], "split=tset; did you mean 'test'"),
    (["methods=mola", "workers=0"], "workers=0 must be at least 1"),
    (["methods=mola", "steps=0"], "steps=0 must be at least 1"),
    (["methods=mola", "baseline=lorra"], "baseline=lorra is no arm; known: mola"),
    (["methods=mola", "budget=molla"], "budget=molla is neither an arm nor a number; did you mean 'mola'"),
    (["methods=mola", "budget=mola", "match=none"], "budget=mola and match=none disagree"),
    (["methods=mola", "adapter.num_expert=3"], "no arm has a setting adapter.num_expert; did you mean 'num_experts'"),
    (["methods=mola", "adapter.r=3"], "adapter.r and match=trainable_params disagree"),
    (["methods=mola", "arms.lora.r=3"], "arms.lora.r and match=trainable_params disagree"),
    (["methods=mola", "arms.mola.top_k=9"], "top_k"),
    (["methods=mola", "arms.mola=3"], "arms.mola must hold settings"),
    (
        ["methods=mola", "arms.mola.adapter.top_k=1", "arms.mola.top_k=2"],
        r"arms\.mola\.top_k and arms\.mola\.adapter\.top_k are one setting: leave one out",
    ),
    (["methods=mola", "out="], "out is empty: name a folder"),
    (["methods=mola", "out=/"], "out=/ is the root of the file system; name another"),
    (["methods=mola", "arms.x.method=molla"], "arms.x: no method 'molla'"),
    (["methods=mola", "arms.mola.lr=3"], r"arms\.mola\.lr: lr is the same for all arms; lrs="),
    (["methods=mola", "lr=1e-3", "lrs=1e-3,1e-2"], r"lr=0\.001 and lrs=0\.001,0\.01 disagree: leave one out"),
    (["methods=mola", "limit=3"], "limit=3 is of trials, and there are none .*eval_limit is that of the runs"),
    (["methods=mola", "lrs=1e-3", "tune_steps=3"], "tune_steps=3 is of trials"),
    (["methods=mola", "eval_limit=0"], "eval_limit=0 must be at least 1"),
    (["methods=mola", "gpus=1"], "gpus=1 needs engine=ray"),
    (["methods=mola", "arms.lora.use_dora=true"], "arm lora: adapter.use_dora=true .* method=dora is LoRA with it"),
    (["methods=mola", "arms.lora.rank_pattern=3", "match=none"], "arm lora: adapter.rank_pattern=3 must hold numbers"),
    (["methods=mola", "arms.mola.trainable_token_indices=x"], "arm mola: trainable_token_indices='x' must be a list"),
    (["methods=oracle", "arms.oracle.num_experts=5"], "arm oracle: num_experts=5, but there are 2 tasks"),
    (["methods=topiclora", "arms.topiclora.topics=nowhere"], "arm topiclora: no topics file nowhere"),
    (
        ["methods=mola", "match=rank", "budget=1e12"],
        "arm lora: budget=1e12 takes rank 1,000,000,000,000",
    ),
    (["methods=mola", "tasks=[[1]]"], "tasks=.*must be a list of texts"),
    (["methods=mola", "out=/dev/null/x"], "out=/dev/null/x cannot be written: Not a directory"),
    (["methods=mola", "arms.a/b.method=mola"], "arms.a/b: it names folders"),
    (["methods=mola", "arms.mola.use_dora=true"], "adapter.use_dora=true cannot go with method=mola"),
    (["methods=hotmoe", "budget=9000"], "arm hotmoe: match=trainable_params and adapter.num_experts=8 disagree"),
    (["methods=lora,oracle", "tasks=even"], "method=oracle gates by task id, but tasks=even is one task only"),
    (["methods=mola", "tasks=evn"], "no task 'evn'"),
    (["methods=mola", "data="], "data is missing"),
    (["methods=mola", "data=nowhere/"], "no such file or folder|neither a file"),
    (["methods=mola", "split=test"], "has no test split"),
    (["methods=mola", "adapter.target_modules=nowhere"], "nowhere"),
    (["methods=mola", "a.yaml", "b.yaml"], "one file of settings at most"),
    (["nowhere.yaml"], "no file nowhere.yaml"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[" ".join(more) or "nothing" for more, _ in REFUSED])
def test_what_cannot_be_run_is_refused_in_one_line_before_anything_is_loaded_or_written(
    world, tmp_path, monkeypatch, more, message
):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(embedded, "load_model", loaded)
    monkeypatch.setattr(cells, "run_job", loaded)
    with pytest.raises(MoesaicError, match=message) as caught:
        run(settings(world, f"out={tmp_path / 'out'}", *more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_file_of_rows_is_refused(world, tmp_path):
    rows = world / "encoder-data" / "even" / "train.jsonl"
    with pytest.raises(ConfigError, match=r"train\.jsonl is one file: name a folder"):
        planned(world, "methods=mola", f"data={rows}")


def write_rows(folder: Path, **splits: list[dict]) -> Path:
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_scored_task_that_is_not_trained_is_refused_where_an_arm_gates_by_task_id(world, tmp_path):
    rows = [{"task": task, "prompt": "first 1 2 :", "completion": "1"} for task in "abc"]
    data = f"data={write_rows(tmp_path / 'rows', train=rows[:2] * 9, validation=rows)}"
    message = r"arm {} gates by task id, and runs \(validation\) are scored on task 'c', .*: tasks=a,b leaves it out"
    with pytest.raises(ConfigError, match=message.format("moelora") + "$"):
        planned(world, "methods=moelora", "controls=false", data, kind="causal")
    with pytest.raises(ConfigError, match=message.format("oracle") + ", controls=false the arm$"):
        planned(world, "methods=mola", data, kind="causal")
    assert planned(world, "methods=moelora", "tasks=a,b", data, kind="causal").scored["runs (validation)"].keys() == {
        "a",
        "b",
    }
    assert list(planned(world, "methods=mola", "controls=false", data, kind="causal").arms) == ["lora", "mola"]


@pytest.mark.parametrize("mixed", ["train", "validation"])
def test_a_task_with_rows_with_and_without_choices_is_refused(world, tmp_path, mixed):
    text = {"task": "a", "prompt": "first 1 2 :", "completion": "1"}
    choice = {"task": "a", "prompt": "first 1 2 :", "choices": ["1", "2"], "answer": 0}
    splits = {"train": [text] * 9, "validation": [text], mixed: [text, choice]}
    with pytest.raises(MoesaicError, match="task 'a' has rows with and without choices: give them two names"):
        planned(world, "methods=lora", f"data={write_rows(tmp_path / 'rows', **splits)}", kind="causal")


def test_rows_that_an_encoder_cannot_answer_are_refused(world):
    with pytest.raises(MoesaicError, match="an encoder cannot write an answer"):
        planned(world, "methods=mola", f"data={world / 'causal-data'}")


def test_a_dry_run_shows_what_training_will_have_and_writes_nothing(world, tmp_path, capsys):
    ask = settings(world, "methods=mola,dora", "lrs=1e-3,3e-3", "limit=5", "seeds=0,1", f"out={tmp_path / 'out'}")
    assert main(["compare", *ask, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "12 trials of 1 steps, then 12 runs of 4 steps (6 arms x 2 seeds)" in shown
    assert "trials (validation): scored on 5 of even, 5 of pick\nruns (validation): scored on 20 of even" in shown
    assert main(["compare", *ask, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trials"], found["cells"]) == (12, 12)
    assert not (tmp_path / "out").exists()
    for arm in found["arms"].values():
        assert f"{arm['trainable_parameters']:,}" in shown
    arm = found["arms"]["mola"]
    recipe = Recipe(
        method=arm["method"],
        adapter=arm["adapter"],
        model=str(world / "encoder"),
        data=str(world / "encoder-data"),
    )
    real = prepare(recipe, load_examples(recipe))
    assert arm["trainable_parameters"] == sum(p.numel() for p in real.model.parameters() if p.requires_grad)


# -- running -------------------------------------------------------------------------------------------------------


def small(world, out: Path, *more: str) -> list[str]:
    return settings(world, "methods=lora,mola", "seeds=0,1", "controls=false", f"out={out}", *more)


def test_a_comparison_tunes_runs_and_sums_up_and_is_not_run_twice(world, tmp_path, here, capsys, monkeypatch):
    out = tmp_path / "out"
    ask = small(world, out, "lrs=1e-2,1e-3", "tune_steps=2", "limit=3", "eval_limit=7")
    assert run(ask) == 0
    shown = capsys.readouterr()
    trials = {f"{arm}-lr{lr}" for arm in ("lora", "mola") for lr in ("0.01", "0.001")}
    runs = {f"{arm}-s{seed}" for arm in ("lora", "mola") for seed in (0, 1)}
    assert set(Here.ran[:4]) == trials
    assert set(Here.ran[4:]) == runs
    told = re.findall(r"\[(\d)/8\] (?=\w)", shown.err)  # a bar of another library may stand before one, on its line
    assert told == [str(i) for i in range(1, 9)]
    figures = read(out / "comparison.json")
    for name in trials:
        scores = read(out / "tuning" / name / "eval-validation.json")
        assert (scores["limit"], scores["seed"]) == (3, 1000)
        assert read(out / "tuning" / name / "results.json")["steps"] == 2
    for arm in ("lora", "mola"):
        tried = {
            lr: read(out / "tuning" / f"{arm}-lr{lr}" / "eval-validation.json")["mean"] for lr in ("0.001", "0.01")
        }
        assert figures["settings"]["tuning"][arm] == tried
        best = max(tried, key=lambda lr: (tried[lr], -float(lr)))
        assert {load_recipe(str(out / "cells" / f"{arm}-s{s}")).lr for s in (0, 1)} == {float(best)}
    one, two = (load_recipe(str(out / "cells" / name)).describes() for name in ("lora-s0", "mola-s0"))
    assert {key for key in one if one[key] != two[key]} <= {"method", "adapter", "lr"}
    trained = {arm: read(out / "cells" / f"{arm}-s1" / "results.json") for arm in ("lora", "mola")}
    assert trained["lora"]["command"] == f"moesaic train {out / 'cells' / 'lora-s1'} out={out / 'cells' / 'lora-s1'}"
    plans = read(out / "arms.json")["arms"]
    assert {a: r["trainable_parameters"] for a, r in trained.items()} == {
        a: p["trainable_parameters"] for a, p in plans.items()
    }
    assert read(out / "cells" / "mola-s1" / "eval-validation.json")["tasks"]["even"]["n"] == 7
    assert load_recipe(str(out / "tuning" / "lora-lr0.01")).warmup == 0, "that of a run of two steps"
    assert [arm["arm"] for arm in figures["arms"]] == ["lora", "mola"]
    assert (out / "report.html").is_file()
    assert "base_mean" in read(out / "cells" / "lora-s0" / "eval-validation.json")
    assert "base_mean" not in read(out / "cells" / "mola-s0" / "eval-validation.json")

    here.ran.clear()
    assert run([str(out)]) == 0
    assert here.ran == []
    assert read(out / "comparison.json")["arms"] == figures["arms"]
    monkeypatch.setattr(Here, "template", out / "cells" / "lora-s0")
    monkeypatch.setattr(Here, "trial", out / "tuning" / "lora-lr0.01")
    assert run([*ask, "seeds=0,1,5", "methods=lora,mola,dora"]) == 0
    assert sorted(here.ran) == sorted(
        ["lora-s5", "mola-s5", "dora-lr0.01", "dora-lr0.001", "dora-s0", "dora-s1", "dora-s5"]
    )


def test_equal_scores_take_the_lower_rate(world, tmp_path, quick):
    out = tmp_path / "out"
    run(small(world, out, "lrs=3e-3,1e-3,2e-3", "tune_steps=1", "methods=lora", "seeds=0"))
    assert load_recipe(str(out / "cells" / "lora-s0")).lr == 1e-3


def test_a_cell_that_fails_is_kept_as_failed_while_the_rest_goes_on_and_is_tried_again(
    world, tmp_path, quick, monkeypatch, capsys
):
    out = tmp_path / "out"
    monkeypatch.setattr(Here, "broken", ("mola-s0",))
    assert main(["compare", *small(world, out)]) == 1
    shown = capsys.readouterr()
    assert "failed: mola s0: out of luck" in shown.out
    assert "3 of 4 cells" in shown.out
    assert "mola-s0: failed: out of luck" in shown.err
    assert read(out / "cells" / "mola-s0" / "failed.json") == {"error": "out of luck", "code": 2}
    missing = read(out / "comparison.json")["missing"]
    assert missing == [{"arm": "mola", "seed": 0, "status": "failed", "error": "out of luck"}]
    monkeypatch.setattr(Here, "broken", ())
    quick.ran.clear()
    assert main(["compare", str(out), "--json"]) == 0
    assert quick.ran == ["mola-s0"]
    assert json.loads(capsys.readouterr().out)["missing"] == []
    assert not (out / "cells" / "mola-s0" / "failed.json").exists()


def test_an_arm_whose_trials_all_fail_is_failed_and_is_not_run(world, tmp_path, quick, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(Here, "broken", ("mola-lr0.001", "mola-lr0.01", "lora-lr0.01"))
    assert run(small(world, out, "lrs=1e-3,1e-2", "tune_steps=1")) == 1
    assert {name for name in quick.ran if "-s" in name} == {"lora-s0", "lora-s1"}
    missing = read(out / "comparison.json")["missing"]
    assert {m["error"] for m in missing} == {"no rate of lrs could be trained: out of luck"}
    assert len(missing) == 2


def test_other_settings_in_the_same_folder_are_refused_by_the_key_that_differs(world, tmp_path, quick, monkeypatch):
    out = tmp_path / "out"
    ask = small(world, out)
    assert run(ask) == 0
    quick.ran.clear()
    for more, message in (
        (["steps=5"], "holds a comparison with steps=4, now 5: set it back"),
        (["methods=lora"], "whose methods have mola: leave it in"),
        (["seeds=1"], "whose seeds have 0: leave it in"),
        (["lrs=1e-4,1e-3"], r"with lrs=\[\], now 0\.0001,0\.001: set it back"),
        (["eval_limit=3"], r"with eval_limit=\(not set\), now 3: set it back"),
        (["arms.mola.top_k=1"], r"with arms\.mola\.top_k=2, now 1: set back"),
        (["adapter.lora_dropout=0.5"], r"with arms\.lora\.lora_dropout=0\.0, now 0\.5: set back"),
        (["budget=30000"], r"with arms\.lora\.r=\d+, now \d+; arms\.lora\.lora_alpha="),
        (["match=rank"], "with match=trainable_params, now rank"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            run([*ask, *more])
        assert "\n" not in str(caught.value)
    file = world / "encoder-data" / "even" / "train.jsonl"
    text = file.read_text()
    file.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(ConfigError, match="on other training rows of data="):
        run(ask)
    file.write_text(text)
    file = file.with_name("validation.jsonl")
    text = file.read_text()
    file.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(ConfigError, match="on other validation rows of data="):
        run(ask)
    file.write_text(text)
    assert quick.ran == []
    assert run([*ask, "workers=2", "threads=2", "save_every=9", "overwrite=false"]) == 0
    assert quick.ran == []
    assert run([*ask, "steps=1", "methods=lora", "seeds=3", "overwrite=true"]) == 0
    assert quick.ran == ["lora-s3"]
    assert [p.name for p in (out / "cells").iterdir()] == ["lora-s3"]


def test_a_topics_file_with_another_content_is_refused(world, tmp_path, quick):
    topics, out = tmp_path / "mine.safetensors", tmp_path / "out"
    make = ["topics", "build", f"out={topics}", "encoder=hashing", "num_experts=3", "topic_dim=8", "steps=2"]
    arm = [f"arms.topiclora.topics={topics}", "arms.topiclora.num_experts=3", "arms.topiclora.topic_dim=8"]
    ask = settings(world, "methods=lora,topiclora", "seeds=0", "controls=false", f"out={out}", *arm)
    assert main(make) == 0
    assert run(ask) == 0
    assert main([*make, "seed=1", "overwrite=true"]) == 0
    with pytest.raises(ConfigError, match=rf"holds a comparison with another {topics} than there is now"):
        run(ask)


def test_a_folder_goes_on_where_it_lies_with_the_command_that_began_it(world, tmp_path, quick, monkeypatch):
    out, moved = tmp_path / "out", tmp_path / "moved"
    monkeypatch.setattr(sys, "argv", ["moesaic", "compare", "mine.yaml"])
    assert run(small(world, out)) == 0
    out.rename(moved)
    quick.ran.clear()
    monkeypatch.setattr(sys, "argv", ["moesaic", "compare", str(moved)])
    assert run([str(moved)]) == 0
    assert quick.ran == []
    assert not out.exists()
    assert read(moved / "comparison.json")["settings"]["command"] == "moesaic compare mine.yaml"
    assert load([str(moved), f"out={out}"])[0].out == str(out)
    monkeypatch.setattr(sys, "argv", ["moesaic", "compare", str(moved), "seeds=0,1,2"])
    assert run([str(moved), "seeds=0,1,2"]) == 0
    said = f"moesaic compare mine.yaml; moesaic compare {moved} seeds=0,1,2"
    assert read(moved / "comparison.json")["settings"]["command"] == said
    assert f"- command: {said}\n" in (moved / "table.md").read_text()


@pytest.mark.parametrize("first", ["out=.", "out"])
def test_a_comparison_can_be_in_the_folder_that_one_is_in(world, tmp_path, quick, monkeypatch, first):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    ask = small(world, out)
    assert run([*ask[:-1], "out=."] if first == "out=." else ask) == 0
    quick.ran.clear()
    assert run(["."]) == 0
    assert quick.ran == []
    assert yaml.safe_load((out / "compare.yaml").read_text())["out"] == str(out)


def test_a_larger_arm_is_told_how_to_keep_the_budget(world, tmp_path, quick):
    ask = settings(world, "methods=lora,mola", "seeds=0", "controls=false", f"out={tmp_path / 'out'}")
    assert run(ask) == 0
    with pytest.raises(ConfigError, match="or budget=mola, to which arms were matched there"):
        run([*ask, "arms.big={method: mola, num_experts: 16}"])
    assert run([*ask, "budget=mola"]) == 0
    assert quick.ran == ["lora-s0", "mola-s0"]


def test_a_comparison_stopped_while_its_first_file_was_written_goes_on(world, tmp_path, quick):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".compare.yaml.part").write_text("x")
    (out / ".lock").touch()
    assert run(small(world, out)) == 0


def test_folders_of_others_are_left_alone(world, tmp_path, quick):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("x")
    for more in ((), ("overwrite=true",)):
        with pytest.raises(ConfigError, match="not a comparison's"):
            run(small(world, thesis, *more))
    with pytest.raises(ConfigError, match="is a file"):
        run(small(world, thesis / "chapter1.tex"))
    assert [p.name for p in thesis.iterdir()] == ["chapter1.tex"]
    assert quick.ran == []


def test_a_finished_run_with_other_settings_is_not_taken_for_the_cell(world, tmp_path, quick):
    out = tmp_path / "out"
    assert run(small(world, out)) == 0
    file = out / "cells" / "mola-s0" / "recipe.yaml"
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 0.005"))
    with pytest.raises(ConfigError, match=r"mola-s0 holds a run with lr=0\.005, now 0\.001: remove that folder"):
        run(small(world, out))


DAMAGE = {
    "eval-validation.json": [
        {"mean": None}, {"mean": "x"}, {"mean": math.nan}, {"routing": [3]}, {"tasks": None},
        {"routing": {"by_layer_and_task": "x"}}, {"base_mean": "x"}, {"mean": 99}, {"mean": 0.987},
        {"base_mean": 0.987},
    ],
    "results.json": [
        {"trainable_parameters": "a"}, {"versions": ["a"]}, {"versions": {"a": ["b"]}}, {"device": {"a": 1}},
    ],
    "metrics.jsonl": [{"step": 0, "loss": 1}, {"step": 1, "loss": math.nan}],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_cell_edited_by_hand_is_failed_and_the_others_are_told(world, tmp_path, quick, name, capsys):
    out = tmp_path / "out"
    assert run(small(world, out)) == 0
    file = out / "cells" / "lora-s0" / name
    before = json.loads(file.read_text().splitlines()[0]) if name.endswith("l") else read(file)
    for damage in DAMAGE[name]:
        file.write_text(json.dumps({**before, **damage}))
        capsys.readouterr()
        assert main(["compare", str(out)]) == 1
        assert f"remove {file.parent} to run it again" in capsys.readouterr().out, damage
        figures = read(out / "comparison.json")
        assert [(m["arm"], m["seed"], m["status"]) for m in figures["missing"]] == [("lora", 0, "failed")], damage
    shutil.rmtree(file.parent)
    assert run([str(out)]) == 0


@pytest.mark.parametrize("damage", [{"score": 0.123}, {"score": "x"}, {"n": 19}, {"stderr": -1}, {"base_score": True}])
def test_scores_that_are_not_what_the_predictions_say_fail_their_cell(world, tmp_path, quick, damage, capsys):
    out = tmp_path / "out"
    assert run(small(world, out)) == 0
    file = out / "cells" / "lora-s0" / "eval-validation.json"
    scores = read(file)
    scores["tasks"]["even"] |= damage
    for key in ("mean", "base_mean"):
        found = [task[key.replace("mean", "score")] for task in scores["tasks"].values()]
        scores[key] = 0.5 if "x" in found else sum(found) / len(found)
    file.write_text(json.dumps(scores))
    capsys.readouterr()
    assert main(["compare", str(out)]) == 1
    assert f"remove {file.parent} to run it again" in capsys.readouterr().out
    assert [(m["arm"], m["seed"]) for m in read(out / "comparison.json")["missing"]] == [("lora", 0)]


@pytest.mark.parametrize("more", [["limit=2"], ["tasks=even"], ["base=false"]])
def test_a_cell_that_was_scored_otherwise_by_hand_is_scored_again(world, tmp_path, here, more):
    out = tmp_path / "out"
    ask = settings(world, "methods=lora", "seeds=0", "steps=1", "eval_limit=5", f"out={out}")
    assert run(ask) == 0
    folder = out / "cells" / "lora-s0"
    wanted, trained = read(folder / "eval-validation.json"), (folder / "results.json").read_text()
    assert main(["eval", str(folder), *(more if more != ["base=false"] else [*more, "limit=5"])]) == 0
    here.ran.clear()
    assert run(ask) == 0
    assert here.ran == ["lora-s0"]
    found = read(folder / "eval-validation.json")
    assert {key: found[key] for key in ("tasks", "limit", "base_mean")} == {
        key: wanted[key] for key in ("tasks", "limit", "base_mean")
    }
    assert (folder / "results.json").read_text() == trained


def test_a_cell_whose_rows_change_while_it_runs_is_failed(world, tmp_path, quick, capsys):
    assert main(["compare", *small(world, tmp_path / "out", "eval_limit=7", "methods=lora", "seeds=0")]) == 1
    assert "failed: lora s0: it was not scored on the planned rows of data=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["results.json", "eval-validation.json", "predictions-validation.jsonl", "recipe.yaml"]
)
def test_an_empty_file_of_a_cell_fails_it_alone(world, tmp_path, quick, name, capsys):
    out = tmp_path / "out"
    assert run(small(world, out)) == 0
    file = out / "cells" / "mola-s0" / name
    file.write_text("")
    capsys.readouterr()
    assert main(["compare", str(out)]) == 1
    assert f"remove {file.parent} to run it again" in capsys.readouterr().out
    assert len(read(out / "comparison.json")["missing"]) == 1


def test_without_its_plan_a_comparison_is_not_continued(world, tmp_path, quick):
    out = tmp_path / "out"
    assert run(small(world, out)) == 0
    (out / "arms.json").unlink()
    with pytest.raises(ConfigError, match=r"has runs but no arms\.json, which says what they were trained on"):
        run([str(out)])


@pytest.mark.parametrize("damage", [{"arms": 3}, {"arms": {"lora": {}}}, {"arms": None}])
def test_a_plan_edited_by_hand_is_named_in_one_line(world, tmp_path, quick, damage):
    out = tmp_path / "out"
    assert run(small(world, out)) == 0
    file = out / "arms.json"
    file.write_text(json.dumps({**read(file), **damage}))
    with pytest.raises(ConfigError, match=r"arms\.json is damaged") as caught:
        run([str(out)])
    assert "\n" not in str(caught.value)


def test_two_comparisons_do_not_share_a_folder(world, tmp_path, quick, monkeypatch):
    out, errors = tmp_path / "out", []

    def second(job, stops):
        try:
            run(small(world, out))
        except ConfigError as error:
            errors.append(str(error))
        return cells.Outcome(job, "failed", "enough")

    monkeypatch.setattr(cells, "run_job", second)
    assert run(small(world, out)) == 1
    assert set(errors) == {f"another process is writing {out}: wait for it, or another out="}


def test_settings_come_from_a_file_with_more_on_top(world, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"methods": ["mola"], "model": str(world / "encoder"), "seeds": [4], "adapter": {}}))
    found, recipe = load([str(file), "seeds=5", "lr=3e-4"])
    assert (found.methods, found.seeds, recipe.lr, recipe.model) == (["mola"], [5], 3e-4, str(world / "encoder"))
    file.write_text("methods: [mola]\neval_limit: 5\nbudget: mola\ntasks: [even]\n")
    found, recipe = load([str(file), "eval_limit=null", "budget=null", "tasks=null"])
    assert (found.eval_limit, found.budget, recipe.tasks) == (None, None, None)
    with pytest.raises(ConfigError, match="settings: workers=null: leave it out"):
        load([str(file), "workers=null"])
    file.write_text("methods: [mola]\nseedz: [1]\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key 'seedz'; did you mean 'seeds'"):
        load([str(file)])


# -- processes -----------------------------------------------------------------------------------------------------


def test_a_cell_is_a_process_of_its_own_with_its_own_memory_and_threads(world, tmp_path, capsys):
    out = tmp_path / "out"
    ballast = torch.ones(2**28)  # 1 GiB held here must not count there
    ask = settings(world, "methods=lora", "arms.lora.lora_dropout=0.1", "seeds=0", f"out={out}", "steps=2")
    assert main(["compare", *ask]) == 0, capsys.readouterr()
    results = read(out / "cells" / "lora-s0" / "results.json")
    assert results["peak_memory_of"] == "process"
    assert results["peak_memory_mib"] < ballast.numel() * 4 / 2**20
    assert "1 threads" in results["device"]
    assert "2 steps in" in (out / "cells" / "lora-s0" / "log.txt").read_text()


def job_in(folder: Path) -> cells.Job:
    return cells.Job(folder.name, Recipe(out=str(folder)), "validation", None, False, 1, "")


SLEEPER = """
import signal, sys, time
def stop(*_):
    global asked
    asked += 1
    if asked == 1:
        time.sleep(0.3)
        print("checkpoint", flush=True)
        sys.exit(130)
asked = 0
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_that_is_asked_to_stop_is_given_the_time_for_a_checkpoint(tmp_path, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(cells.subprocess, "Popen", lambda command, **kw: popen([sys.executable, "-c", SLEEPER], **kw))
    log = tmp_path / "cell" / "log.txt"
    outcome = cells.run_job(job_in(tmp_path / "cell"), lambda: int(log.is_file() and "ready" in log.read_text()))
    assert (outcome.status, outcome.error) == ("pending", "stopped")
    assert log.read_text().split() == ["ready", "checkpoint"]
    assert not (tmp_path / "cell" / "failed.json").exists()


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("os._exit(9)", "its process ended with code 9"),
        ("os.kill(os.getpid(), 9)", "its process ended by SIGKILL"),
        ("print('going on', flush=True); os.kill(os.getpid(), 9)", "ended by SIGKILL; it last said: going on"),
        ("print('moesaic: no such file', flush=True); os._exit(2)", "no such file"),
    ],
)
def test_a_process_that_dies_is_a_failure_with_its_last_word_or_its_code(tmp_path, monkeypatch, end, error):
    popen = subprocess.Popen
    monkeypatch.setattr(
        cells.subprocess, "Popen", lambda command, **kw: popen([sys.executable, "-c", f"import os; {end}"], **kw)
    )
    outcome = cells.run_job(job_in(tmp_path / "cell"))
    assert outcome.status == "failed"
    assert outcome.error.endswith(error)


def test_a_process_ends_with_the_pipe_on_its_stdin():
    code = (
        "import time; from moesaic.compare import cells; cells.end_with_parent(); print(1, flush=True); time.sleep({})"
    )
    common = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code.format(60)], stdin=subprocess.PIPE, **common) as process:
        assert process.stdout.readline() == "1\n"
        process.stdin.close()
        assert process.wait(30) == -signal.SIGTERM
    done = subprocess.run([sys.executable, "-c", code.format(0.2)], stdin=subprocess.DEVNULL, check=False, **common)
    assert done.returncode == 0


def test_a_run_that_another_process_has_is_left_to_it(tmp_path):
    """Its log stays locked by the process that writes it, also where the one that started that was killed."""
    job = job_in(tmp_path / "cell")
    job.run.path.mkdir()
    log = job.run.path / "log.txt"
    with log.open("ab") as file:
        assert cells.claim(file)
        command = [sys.executable, "-c", "print(1, flush=True); input()"]
        orphan = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
    with orphan:
        while not log.read_text():
            time.sleep(0.01)
        outcome = cells.run_job(job)
        assert (outcome.status, outcome.error) == ("pending", "another process runs it")
        assert log.read_text() == "1\n"
    with cells.locked(job.run.path):  # as `moesaic train` does
        assert cells.run_job(job).status == "pending"
    assert log.read_text() == "1\n"
    assert not job.failure.exists()
    assert cells.run_job(job).status == "failed"


def test_what_another_process_runs_is_pending_in_the_comparison(world, tmp_path, quick, monkeypatch, capsys):
    out, real = tmp_path / "out", cells.run_job

    def elsewhere(job, stops):
        busy = job.name in ("mola-s0", "lora-lr0.01")
        return cells.Outcome(job, "pending", "another process runs it") if busy else real(job, stops)

    monkeypatch.setattr(cells, "run_job", elsewhere)
    assert run(small(world, out)) == 1
    shown = capsys.readouterr()
    assert "mola-s0: pending: another process runs it" in shown.err
    assert "3 of 4 cells" in shown.out
    assert run([*small(world, out), "lrs=1e-3,1e-2", "tune_steps=1", "overwrite=true"]) == 1
    missing = [(m["arm"], m["status"], m["error"]) for m in read(out / "comparison.json")["missing"]]
    waits = ("lora", "pending", "its trial lora-lr0.01 is not done: another process runs it")
    assert missing == [waits, ("mola", "pending", "another process runs it"), waits]


def test_a_run_that_cannot_be_scored_says_what_to_remove(tmp_path, monkeypatch):
    job = job_in(tmp_path / "cell")
    popen = subprocess.Popen
    code = f"open({str(job.run.results)!r}, 'w').write('{{}}'); print('moesaic: it is damaged'); exit(2)"
    monkeypatch.setattr(cells.subprocess, "Popen", lambda command, **kw: popen([sys.executable, "-c", code], **kw))
    error = f"it is damaged (it was trained, not scored; remove {job.run.path} to train it again)"
    assert cells.run_job(job).error == error


def test_ctrl_c_stops_what_runs_and_starts_nothing_more(tmp_path, monkeypatch):
    begun, ended = [], []

    def wait(job, stops):
        begun.append(job.name)
        while not stops():
            time.sleep(0.01)
        ended.append(job.name)
        return cells.Outcome(job, "pending", "stopped")

    monkeypatch.setattr(cells, "run_job", wait)
    engine = cells.local([job_in(tmp_path / name) for name in "abc"], workers=2)

    def interrupt():
        while len(begun) < 2:
            time.sleep(0.01)
        time.sleep(0.2)  # the pool has taken note of its threads
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            next(engine)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(begun) == sorted(ended) == ["a", "b"]


def test_an_interrupted_comparison_says_how_it_goes_on(world, tmp_path, quick, monkeypatch, capsys):
    out = tmp_path / "out"
    real = cells.run_job

    def once(job, stops):
        if quick.ran:
            raise KeyboardInterrupt
        return real(job, stops)

    monkeypatch.setattr(cells, "run_job", once)
    assert main(["compare", *small(world, out)]) == 130
    assert "stopped with 1 of 4 runs done; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(cells, "run_job", real)
    assert main(["compare", *small(world, out)]) == 0
    assert len(quick.ran) == 4


def test_ray_runs_the_same_jobs(world, tmp_path, quick, monkeypatch):
    asked = []

    def on_ray(work, jobs, *, cpus, gpus):
        asked.extend((job.name, cpus(job), gpus) for job in jobs)
        found = {"lora-s0": "its task ended: lost"} if lost else {}
        return closing((job, found.get(job.name) or work(job)) for job in jobs)

    monkeypatch.setattr(cells, "on_ray", on_ray)
    monkeypatch.setattr("moesaic.compare.settings.find_spec", lambda name: name)
    monkeypatch.setattr("moesaic.compare.run.os.cpu_count", lambda: 8)
    out, lost = tmp_path / "out", True
    line = small(world, out, "engine=ray", "gpus=0.5", "seeds=0", "steps=1", "threads=null")
    assert run(line) == 1
    assert asked == [("lora-s0", 1, 0.5), ("mola-s0", 1, 0.5)]
    lost = False
    assert run(line) == 0
    assert sorted(quick.ran) == ["lora-s0", "mola-s0"]


def test_ray_that_is_not_installed_names_the_extra(world, monkeypatch):
    monkeypatch.setattr("moesaic.compare.settings.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"this needs ray: pip install 'moesaic\[ray\]'"):
        planned(world, "methods=mola", "engine=ray")


def test_every_registered_method_can_be_an_arm(world):
    methods = ",".join(FROM_SCRATCH)
    found = planned(world, f"methods={methods}", kind="causal")
    assert set(found.arms) == {"lora", *FROM_SCRATCH, "bound"}
    for name, arm in found.arms.items():
        assert name == "bound" or abs(arm.trainable / found.budget - 1) <= 0.01
