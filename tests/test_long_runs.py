"""Runs that are watched, gone on with, and made longer: held-out loss, reports, progress, size."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

import moesaic
from moesaic.cli.main import main
from moesaic.data import examples as data
from moesaic.errors import ConfigError, DataError
from moesaic.lora import size
from moesaic.runs import pace
from moesaic.runs.folder import RunFolder, read_json
from moesaic.runs.recipe import load_recipe
from moesaic.training.held_out import ROWS, HeldOut, load_held_out
from moesaic.training.progress import Progress
from moesaic.training.trainer import RunMixin
from tests.running import run, settings
from tests.tiny import llama
from tests.tiny_folders import write_tasks, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    return write_world(root)


def lines(folder: Path, key: str) -> list[dict]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in e]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def back_to(folder: Path, copy: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after a checkpoint."""
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink()
    for later in [s for s in RunFolder(copy).steps() if s > step]:
        shutil.rmtree(RunFolder(copy).checkpoint(later))
    return copy


@pytest.mark.parametrize(
    ("recipe", "kind", "narrow"), [("hotmoe", "causal", "adapter.expert_dim=16"), ("lora", "encoder", "adapter.r=4")]
)
def test_held_out_loss_changes_no_weight_and_is_the_same_after_an_interruption(world, tmp_path, recipe, kind, narrow):
    bare, whole, more = tmp_path / "bare", tmp_path / "whole", ("steps=4", "warmup=1", narrow)
    run(recipe, world, kind, bare, *more)
    run(recipe, world, kind, whole, *more, "eval_every=3", "keep=9")
    assert weights(whole) == weights(bare)
    assert [e["loss"] for e in lines(whole, "loss")] == [e["loss"] for e in lines(bare, "loss")]
    assert [e["step"] for e in lines(whole, "eval_loss")] == [3, 4], "every so many, and at the end"
    again = back_to(whole, tmp_path / "again", 2)
    assert run(recipe, world, kind, again, *more, "eval_every=3", "keep=9")["resumed_from_step"] == 2
    assert weights(again) == weights(whole)
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_held_out_loss_is_that_of_the_rows_whatever_the_batch(world, tmp_path):
    found = []
    for batch in (4, 7):
        out = tmp_path / str(batch)
        run("lora", world, "causal", out, "eval_every=1", "steps=1", "lr=1e-9", "warmup=0", f"batch_size={batch}")
        found.append(lines(out, "eval_loss")[0]["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_best_adapter_is_that_of_the_least_held_out_loss_after_an_interruption_too(world, tmp_path, monkeypatch):
    told = {2: 0.5, 4: 0.3, 6: 0.4}
    monkeypatch.setattr(HeldOut, "loss", lambda self, trainer: told[trainer.state.global_step])
    whole, more = tmp_path / "whole", ("eval_every=2", "take=best", "keep=9")
    results = run("mola", world, "encoder", whole, *more)
    assert results["taken"] == {"step": 4, "eval_loss": 0.3}
    then = load_file(RunFolder(whole).checkpoint(4) / "adapter_model.safetensors")
    now = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in now)
    for step in (2, 4):
        again = back_to(whole, tmp_path / f"from-{step}", step)
        assert run("mola", world, "encoder", again, *more)["taken"] == results["taken"]
        assert weights(again) == weights(whole)


def test_held_out_rows_are_asked_for_before_anything_is_loaded(world, tmp_path):
    file = tmp_path / "rows.jsonl"
    shutil.copy(next((world / "encoder-data").rglob("train.jsonl")), file)
    with pytest.raises(DataError, match=r"^eval_every=5 needs rows .* has no validation split: put train\.jsonl and"):
        run("lora", world, "encoder", tmp_path / "run", f"data={file}", "model=/nowhere/model", "eval_every=5")
    with pytest.raises(ConfigError, match=r"take=best needs held-out losses .*eval_every=N"):
        run("lora", world, "encoder", tmp_path / "run", "take=best")
    with pytest.raises(ConfigError, match="keep is the number of checkpoints; take=best says"):
        run("lora", world, "encoder", tmp_path / "run", "keep=best")
    assert not (tmp_path / "run").exists()


def test_of_many_held_out_rows_the_same_are_taken(tmp_path):
    rows = [json.dumps({"task": "t", "prompt": str(i), "completion": "x"}) for i in range(ROWS + 50)]
    for split in data.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    taken = [load_held_out(load_recipe("lora", [f"data={tmp_path}", f"seed={seed}"]), ["t"]) for seed in (0, 1)]
    assert taken[0] == taken[1]
    assert len({e.prompt for e in taken[0]}) == ROWS


def test_what_a_run_logs_is_read_back_from_tensorboard(world, tmp_path):
    out = tmp_path / "run"
    run("mola", world, "encoder", out, "steps=11", "eval_every=11", "report_to=tensorboard")
    (file,) = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()

    def read(tag: str) -> dict[int, float]:
        return {e.step: e.value for e in events.Scalars(tag)}

    for key, steps in {
        "loss": range(1, 12),
        "router_aux_loss": range(1, 12),
        "router_entropy": (1, 10, 11),
        "router_load_spread": (1, 10, 11),
        "router_dead_share": (1, 10, 11),
        "router_task_information": (1, 10, 11),
    }.items():
        logged = {e["step"]: e[key] for e in lines(out, "loss") if key in e}
        assert [*logged] == [*steps], key
        assert read(f"train/{key}") == pytest.approx(logged, rel=1e-5)
    assert read("eval/loss")[11] == pytest.approx(lines(out, "eval_loss")[0]["eval_loss"], rel=1e-5)
    assert "eval_router_entropy" in lines(out, "eval_loss")[0]


def test_a_report_that_cannot_be_is_one_line_before_anything_is_read(world, tmp_path, monkeypatch):
    class Lacking:
        def __init__(self) -> None:
            raise RuntimeError("this needs swanlab: pip install swanlab")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "swanlab", Lacking)
    for name, message in {
        "tensorbord": "^report_to=tensorbord; did you mean 'tensorboard'",
        "swanlab": "^report_to=swanlab cannot be used here: this needs swanlab: pip install swanlab$",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run("lora", world, "encoder", tmp_path / "run", "data=nowhere.jsonl", f"report_to=tensorboard,{name}")


def test_more_steps_of_a_finished_run_are_those_of_one_run(world, tmp_path):
    """Where the schedule and the method do not depend on how many there are."""
    once, twice, more = tmp_path / "once", tmp_path / "twice", ("schedule=constant_with_warmup", "warmup=1")
    run("mola", world, "causal", once, *more)
    run("mola", world, "causal", twice, *more, "steps=3")
    results = run("mola", world, "causal", twice, *more)
    assert (results["steps"], results["resumed_from_step"]) == (6, 3)
    assert weights(twice) == weights(once)
    assert [e["loss"] for e in lines(twice, "loss")] == [e["loss"] for e in lines(once, "loss")]


def test_more_steps_follow_the_longer_schedule_and_say_so(world, tmp_path, caplog):
    out, once = tmp_path / "run", tmp_path / "once"
    run("lora", world, "encoder", out, "steps=4", "warmup=1")
    run("lora", world, "encoder", once, "warmup=1")
    with pytest.raises(ConfigError, match=r"holds a finished run with lr=0.01, now 0.02: set it back"):
        run("lora", world, "encoder", out, "warmup=1", "lr=0.02")
    assert RunFolder(out).finished
    run("lora", world, "encoder", out, "warmup=1")
    assert "going on from step 4 to 6; from here on lr is schedule=linear's over 6" in caplog.text
    rates = [[e["learning_rate"] for e in lines(folder, "loss")] for folder in (out, once)]
    assert rates[0][4:] == rates[1][4:]
    assert rates[0][4] > 0
    for steps in (6, 5):
        with pytest.raises(ConfigError, match="holds a finished run; more steps=… go on with it, overwrite=true"):
            run("lora", world, "encoder", out, "warmup=1", f"steps={steps}")
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(
        ConfigError, match=r"a finished run of 6 steps without the checkpoint .*overwrite=true makes all 9"
    ):
        run("lora", world, "encoder", out, "warmup=1", "steps=9")
    assert run("lora", world, "encoder", out, "warmup=1", "overwrite=true", "steps=1")["steps"] == 1


def test_wrong_data_is_told_before_a_finished_run_is(world, tmp_path):
    out = tmp_path / "run"
    run("lora", world, "encoder", out, "steps=1")
    with pytest.raises(DataError, match=r"no such file or folder: nowhere\.jsonl"):
        run("lora", world, "encoder", out, "data=nowhere.jsonl")
    other = write_tasks(tmp_path / "other", "encoder")
    with pytest.raises(
        ConfigError, match=r"holds a finished run with data=.*encoder-data, now .*other; overwrite=true"
    ):
        run("lora", world, "encoder", out, f"data={other}", "steps=1")


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def due(total: int, seconds: float) -> list[int]:
        """The steps of a run that are told of, at so many seconds a step."""
        now[0] = 0.0
        told, found = pace.Pace(total), []
        for step in range(1, total + 1):
            now[0] += seconds
            found += [step] if told.due(step) else []
        return found

    assert due(100, 1) == [30, 60, 90], "never more often than every half minute"
    assert due(100, 10) == [*range(10, 101, 10)], "nor than each tenth of the run"
    assert due(100, 300) == [*range(2, 101, 2)], "but after ten minutes"
    assert due(20, 1) == []
    assert [pace.in_words(s) for s in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


@pytest.mark.parametrize("bar", [True, False])
def test_progress_tells_the_loss_of_the_step_it_stands_beside(monkeypatch, capsys, bar):
    monkeypatch.setattr(pace.Pace, "due", lambda self, done: True)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    state = SimpleNamespace(global_step=0, max_steps=4, is_local_process_zero=True)
    progress = Progress(bar=bar, tokens=lambda: 100)
    progress.on_train_begin(None, state, None)
    for step, loss in ((1, 3.0), (2, 2.0)):
        state.global_step = step
        progress.on_log(None, state, None, {"loss": loss})
        progress.on_log(None, state, None, {"eval_loss": loss + 1})
        if bar:
            assert (progress.bar.n, progress.bar.postfix.split(",")[0]) == (step, f"loss of this step {loss:.3f}")
    progress.on_train_end(None, state, None)
    said = capsys.readouterr().err
    if not bar:
        first, second = said.splitlines()
        assert first.startswith("step 1 of 4, its loss 3.000, ")
        assert second.startswith("step 2 of 4, its loss 2.000, held-out loss 4.000, ")
        assert second.endswith(" left")


def test_a_dry_run_counts_what_training_will_and_tells_of_a_mixtures_size(world, tmp_path, capsys, caplog):
    out, more = tmp_path / "run", ("adapter.num_experts=4", "steps=1")
    assert main(["train", "mola", *settings(world, "encoder", out, *more, "adapter.r=8"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if "times the parameters" in line)
    assert line.endswith("a plain LoRA of r=8; match=lora makes it as large as that recipe's")
    assert not out.exists()
    results = run("mola", world, "encoder", out, *more, "adapter.r=8")
    assert f"# trainable parameters: {results['trainable_parameters']:,} of {results['total_parameters']:,}\n" in told
    assert caplog.text.count("times the parameters") == 1
    for fewer in ("adapter.r=2", "adapter.r=16"):
        matched = ("match=lora",) if fewer == "adapter.r=16" else ()
        assert main(["train", "mola", *settings(world, "encoder", out, *more, fewer, *matched), "--dry-run"]) == 0
        assert "times the parameters" not in capsys.readouterr().out


def test_a_mixture_at_a_loras_settings_says_how_large_it_is_once(monkeypatch, caplog):
    monkeypatch.setattr(size, "_told", False)
    plain = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    get_peft_model(
        llama(), moesaic.matched(moesaic.MoLAConfig, llama(), like=LoraConfig(r=64, target_modules=["q_proj"]))
    )
    get_peft_model(llama(), moesaic.MoLAConfig(r=2, target_modules=["q_proj"]))
    assert "times the parameters" not in caplog.text
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            wrapped = get_peft_model(llama(), moesaic.HotMoEConfig(r=8, target_modules=["q_proj", "v_proj"]))
    (record,) = [r for r in caplog.records if "times the parameters" in r.message]
    times = wrapped.get_nb_trainable_parameters()[0] / get_peft_model(llama(), plain).get_nb_trainable_parameters()[0]
    assert (
        f"this hotmoe trains {times:.1f} times the parameters of a plain LoRA of r=8: moesaic.matched("
        in record.message
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the step that follows."""
    original = RunMixin.compute_loss

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RunMixin, "compute_loss", interrupt)


def test_a_finished_run_is_finished_until_the_longer_one_is(world, tmp_path, monkeypatch):
    """Stopped on the way it stays what it was, and goes on from there; its scores go with its adapter."""
    out, once = tmp_path / "run", tmp_path / "once"
    how = ("warmup=1", "schedule=constant", "save_every=1")
    run("lora", world, "encoder", once, *how, "steps=6")
    before = run("lora", world, "encoder", out, *how, "steps=2")
    assert main(["eval", str(out), "limit=2"]) == 0
    kept = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.suffix in (".json", ".yaml", ".jsonl")}
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run("lora", world, "encoder", out, *how, "steps=6")
    monkeypatch.undo()
    assert read_json(out / "results.json") == before
    for name in ("results.json", "recipe.yaml", "eval-validation.json"):
        assert (out / name).read_bytes() == kept[name]
    assert load_recipe(str(out / "recipe-next.yaml")).steps == 6
    assert main(["eval", str(out), "limit=2"]) == 0
    with pytest.raises(ConfigError, match="is on its way to more steps, with steps=6, now 9: set it back to continue"):
        run("lora", world, "encoder", out, *how, "steps=9")
    assert run("lora", world, "encoder", out, *how, "steps=6")["resumed_from_step"] == 4
    names = {p.name for p in out.iterdir() if p.name[0] != "."} - {"report.html"}
    assert names == {p.name for p in once.iterdir() if p.name[0] != "."}
    assert weights(out) == weights(once)


def test_checkpoints_come_as_often_as_the_longer_run_asks(world, tmp_path):
    out = tmp_path / "run"
    run("lora", world, "encoder", out, "warmup=1", "steps=2", "save_every=100")
    run("lora", world, "encoder", out, "warmup=1", "steps=5", "save_every=1", "keep=9")
    assert RunFolder(out).steps() == [2, 3, 4, 5]
