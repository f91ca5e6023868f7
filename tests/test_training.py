"""Training end to end on tiny models: runs, resumes, kills, and what stops a run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch

from moesaic.data import examples as data
from moesaic.data.causal import CausalCollator, fitting, tokenize
from moesaic.data.sampling import InterleavedSampler
from moesaic.errors import AdapterError, ConfigError, DataError, TrainingError
from moesaic.evaluation.opening import load_run, open_adapter
from moesaic.models.embedded import load_model
from moesaic.models.encoder import EncoderCollator, EncoderForTasks, Layout
from moesaic.runs.folder import RunFolder, atomic_folder, check_writable, discard, locked, read_json, write_text
from moesaic.runs.method import is_routed
from moesaic.runs.recipe import load_recipe
from moesaic.runs.settings import read_yaml
from moesaic.training.prepared import prepare
from tests.running import STEPS, run, settings
from tests.tiny_folders import save_model, tokenizer, write_tasks, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny models and the data for each."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    return write_world(root)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["causal", "encoder"])
@pytest.mark.parametrize("recipe", ["lora", "dora", "rslora", "mola", "hotmoe"])
def test_a_run_leaves_a_folder_that_loads_as_it_was_trained(world, tmp_path, kind, recipe):
    results = run(recipe, world, kind, tmp_path / "run", command="test")
    folder = RunFolder(tmp_path / "run")
    assert folder.finished
    assert [m["step"] for m in metrics_of(folder.path)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(m["loss"]) for m in metrics_of(folder.path))
    assert all(("router_aux_loss" in m) == is_routed(recipe) for m in metrics_of(folder.path))
    assert folder.steps() == [STEPS - 2, STEPS]
    assert results["command"] == "test"
    assert results["trainable_parameters"] > 0
    assert results["tokens_per_second"] > 0
    assert results["peak_memory_of"] == "process"
    assert psutil.Process().memory_info().rss / 2**20 < results["peak_memory_mib"] * 1.5
    assert 50 < results["peak_memory_mib"] < 8192
    assert set(results["versions"]) >= {"torch", "transformers", "peft"}
    assert not list(folder.path.rglob("*.bin")), "nothing pickled but the optimizer's tensors"
    from peft import PeftModel

    stored = load_recipe(str(folder.path))
    prepared = prepare(stored, data.load(stored.data))
    base = prepared.model.unload() if kind == "causal" else EncoderForTasks(prepared.base.model, prepared.layout)
    if kind == "causal":
        reloaded = PeftModel.from_pretrained(base, str(folder.adapter)).state_dict()
        loaded = load_run(folder.path).model.state_dict()
        assert all(torch.equal(reloaded[k], loaded[k]) for k in loaded)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_accumulating_copies_of_a_batch_changes_nothing_but_the_count(world, tmp_path, kind):
    """Four micro-batches of one row give the loss and gradient of one batch of four, as every row counts alike."""
    model = f"model={save_model(tmp_path / 'model', kind, dropout=0.0)}"
    rows = {"one": ("batch_size=4",), "four": ("batch_size=1", "accumulation=4")}
    losses = {}
    for name, more in rows.items():
        run("lora", world, kind, tmp_path / name, model, *more, "adapter.lora_dropout=0", "precision=fp32")
        losses[name] = [(m["loss"], m["grad_norm"]) for m in metrics_of(tmp_path / name)]
    for one, four in zip(losses["one"], losses["four"], strict=True):
        assert four == pytest.approx(one, rel=1e-3)


def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(world, tmp_path):
    recipe, kind = "hotmoe", "causal"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(recipe, world, kind, whole, "precision=fp32")
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from moesaic.training.trainer import RunMixin\n"
        "from moesaic.cli.main import main\n"
        "step = RunMixin.compute_loss\n"
        "def slow(self, *a, **k):\n"
        "    if self.state.global_step == 5: time.sleep(60)\n"
        "    return step(self, *a, **k)\n"
        "RunMixin.compute_loss = slow\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, recipe, *settings(world, kind, killed, "precision=fp32")],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (killed / "metrics.jsonl").exists() or len(metrics_of(killed)) < 5:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    half = killed / "checkpoints" / ".staging" / "checkpoint-5"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text("{")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    results = run(recipe, world, kind, killed, "precision=fp32")
    assert results["resumed_from_step"] == 4
    assert metrics_of(killed) == metrics_of(whole)
    first, second = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, killed))
    assert first == second
    assert not half.exists()


@pytest.mark.parametrize(("recipe", "kind"), [("lora", "causal"), ("mola", "encoder"), ("hotmoe", "encoder")])
def test_going_back_to_a_checkpoint_repeats_the_losses_bit_for_bit(world, tmp_path, recipe, kind):
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(recipe, world, kind, whole, "keep=9", "accumulation=2")
    shutil.copytree(whole, again)
    (again / "results.json").unlink()
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / f"checkpoint-{step}")
    assert run(recipe, world, kind, again, "keep=9", "accumulation=2")["resumed_from_step"] == 2
    assert metrics_of(again) == metrics_of(whole)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
     RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)  # fmt: skip
def test_memory_that_is_not_there_gives_advice_and_keeps_the_checkpoint(world, tmp_path, monkeypatch, error):
    from moesaic.training.trainer import RunMixin

    whole, out = RunMixin.compute_loss, tmp_path / "run"

    def full(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise error
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(RunMixin, "compute_loss", full)
    with pytest.raises(TrainingError, match=r"out of memory: lower batch_size .*; the checkpoint of step 4 is kept"):
        run("lora", world, "encoder", out)
    monkeypatch.undo()
    assert run("lora", world, "encoder", out)["resumed_from_step"] == 4


def test_interrupting_saves_after_the_step_and_the_same_command_goes_on(world, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("lora", world, "encoder", whole)
    from moesaic.training.trainer import RunMixin

    original, handler = RunMixin.compute_loss, signal.getsignal(signal.SIGINT)

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RunMixin, "compute_loss", interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of 6, saved; the same command goes on"):
        run("lora", world, "encoder", stopped)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is an unfinished run"):
        load_run(stopped)
    run("lora", world, "encoder", stopped)
    assert metrics_of(stopped) == metrics_of(whole)


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_non_finite_step_is_named_and_the_last_good_checkpoint_stays(world, tmp_path, monkeypatch, where):
    from moesaic.training.trainer import RunMixin

    out = tmp_path / "run"
    original = RunMixin.compute_loss

    def poison(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step != 4:
            return loss
        if where == "loss":
            self._require_finite(loss * math.nan, "loss")
        loss.register_hook(lambda g: g * math.nan)
        return loss

    monkeypatch.setattr(RunMixin, "compute_loss", poison)
    with pytest.raises(TrainingError, match=f"{where} is nan at step 5: .*checkpoint of step 4 is kept"):
        run("lora", world, "encoder", out)
    monkeypatch.undo()
    assert RunFolder(out).steps() == [2, 4]
    assert run("lora", world, "encoder", out)["resumed_from_step"] == 4


def test_a_learning_rate_that_diverges_stops_with_the_step(world, tmp_path):
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d+: lower lr"):
        run("lora", world, "causal", tmp_path / "run", "lr=1e30", "warmup=0", "schedule=constant", "clip=0")


def test_finished_unfinished_and_foreign_folders(world, tmp_path):
    out = tmp_path / "run"
    run("lora", world, "encoder", out)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a finished run; more steps"):
        run("lora", world, "encoder", out)
    assert (out / "metrics.jsonl").read_bytes() == before
    (out / "results.json").unlink()
    with pytest.raises(ConfigError, match=r"unfinished run with lr=0.01, now 0.02"):
        run("lora", world, "encoder", out, "lr=0.02")
    with pytest.raises(ConfigError, match="resume=auto continues"):
        run("lora", world, "encoder", out, "resume=never")
    assert run("lora", world, "encoder", out, "lr=0.02", "overwrite=true")["resumed_from_step"] == 0
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("x")
    for more in ((), ("overwrite=true",)):
        with pytest.raises(ConfigError, match="not a run's"):
            run("lora", world, "encoder", foreign, *more)
    assert (foreign / "chapter1.tex").read_text() == "x"


def test_a_place_that_cannot_be_is_refused_before_anything_is_read(world, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("x")
    places = {
        foreign / "chapter1.tex": "is a file",
        foreign: "not a run's",
        foreign / "chapter1.tex" / "run": "cannot be written",
    }
    for place, message in places.items():
        with pytest.raises(ConfigError, match=f"^out=.*{message}"):
            run("lora", world, "encoder", place, "data=nowhere.jsonl", "model=/nowhere/model")


def test_only_a_teacher_asks_which_rows_a_run_draws(world, tmp_path, monkeypatch):
    monkeypatch.setattr(InterleavedSampler, "drawn", lambda self: pytest.fail("the order was walked through"))
    for recipe in ("lora", "mola"):
        assert run(recipe, world, "encoder", tmp_path / recipe, "steps=1")["steps"] == 1


def test_the_rows_that_a_run_draws_are_found_without_walking_through_it():
    assert InterleavedSampler(["a", "a", "b"], 10**15, seed=0).drawn() == [0, 1, 2]
    short = InterleavedSampler(["a"] * 50, 7, seed=0)
    assert short.drawn() == sorted(set(short))


def test_an_unfinished_run_is_not_continued_on_other_data(world, tmp_path):
    out, rows = tmp_path / "run", write_tasks(tmp_path / "data", "encoder")
    more = (f"data={rows}",)
    run("lora", world, "encoder", out, *more)
    (out / "results.json").unlink()
    file = next(rows.rglob("train.jsonl"))
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    with pytest.raises(ConfigError, match="on other data"):
        run("lora", world, "encoder", out, *more)


def test_nothing_is_written_when_the_data_or_the_adapter_cannot_be(world, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DataError, match="no task 'sst'"):
        run("lora", world, "encoder", out, "tasks=sst")
    with pytest.raises(ConfigError, match="data is missing"):
        run("lora", world, "encoder", out, "data=")
    with pytest.raises(ConfigError, match="nowhere_proj"):
        run("lora", world, "encoder", out, "adapter.target_modules=nowhere_proj")
    with pytest.raises(DataError, match="an encoder cannot write an answer"):
        run("lora", world, "encoder", out, f"data={world / 'causal-data'}", "tasks=copy")
    assert not out.exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "other"])
def test_a_damaged_or_foreign_adapter_is_one_line(world, tmp_path, damage):
    out = tmp_path / "run"
    run("lora", world, "encoder", out)
    file = out / "adapter" / "adapter_model.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-64])
    elif damage == "remove":
        file.unlink()
    else:
        run("lora", world, "encoder", tmp_path / "wider", "adapter.r=5")
        file.write_bytes((tmp_path / "wider" / "adapter" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"damaged|has no adapter_model\.safetensors") as caught:
        load_run(out)
    assert "\n" not in str(caught.value)


def test_a_folder_is_one_process_at_a_time(world, tmp_path):
    out = tmp_path / "run"
    run("lora", world, "encoder", out)
    (out / "results.json").unlink()
    with locked(out):
        for more in ((), ("overwrite=true",)):
            with pytest.raises(ConfigError, match=r"another process is writing .*run: wait for it") as caught:
                run("lora", world, "encoder", out, *more)
            assert "\n" not in str(caught.value)
    assert run("lora", world, "encoder", out)["resumed_from_step"] == STEPS


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def half() -> None:
        with atomic_folder(tmp_path / "x") as staging:
            (staging / "half").write_text("h")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not (tmp_path / "x").exists()
    with atomic_folder(tmp_path / "x") as staging:
        (staging / "whole").write_text("w")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "whole").read_text() == "w"


@pytest.mark.parametrize("killed_in", ["writing", "first rename", "second rename", "removal"])
def test_a_folder_that_is_replaced_is_there_whatever_stops_it(tmp_path, monkeypatch, killed_in):
    """Old or new, whole, once the folder around it is taken again: as after a kill, nothing is tidied up."""

    def put(text: str) -> None:
        with atomic_folder(tmp_path / "x") as staging:
            (staging / "file").write_text(text)
            if text == "new" and killed_in == "writing":
                raise SystemExit

    put("old")
    replace, left = os.replace, {"first rename": 0, "second rename": 1}.get(killed_in, 9)

    def until_killed(*paths: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", until_killed)
        if killed_in == "removal":
            patched.setattr(shutil, "rmtree", lambda place, **how: place.exists() and sys.exit())
        with pytest.raises(SystemExit):
            put("new")
    with locked(tmp_path):
        wanted = "new" if killed_in in ("second rename", "removal") else "old"
        assert (tmp_path / "x" / "file").read_text() == wanted
    put("next")
    assert (tmp_path / "x" / "file").read_text() == "next"
    assert {p.name for p in tmp_path.iterdir()} == {"x", ".lock"}


def test_remains_of_a_process_with_our_number_are_no_hindrance(tmp_path):
    for name in ("x", f".trash-x-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    discard(tmp_path / "x")
    assert [*tmp_path.iterdir()] == []


def test_what_is_no_file_and_no_folder_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="pipe is no folder"), atomic_folder(pipe):
        pass
    with pytest.raises(ConfigError, match="pipe is no file"):
        write_text(pipe, "text")
    with pytest.raises(ConfigError, match="out=pipe is a device"):
        check_writable(pipe, "out=pipe")
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]
    with pytest.raises(ConfigError, match="out=n cannot be written: File name too long; name another"):
        check_writable(tmp_path / ("n" * 300), "out=n")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="out=link is a link to what is not there"):
        check_writable(tmp_path / "link", "out=link")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*/x: Is a directory"):
        write_text(tmp_path / "x", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("way", ["itself", "link", "here"])
def test_discarding_keeps_links_and_the_folder_one_is_in(tmp_path, monkeypatch, way):
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "inner").mkdir(parents=True)
    (real / "inner" / "file").write_text("x")
    link.symlink_to(real)
    monkeypatch.chdir(real if way == "here" else tmp_path)
    discard({"itself": real, "link": link, "here": Path(".")}[way])
    assert link.is_symlink()
    assert real.is_dir() == (way != "itself")
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["link"] if way == "itself" else ["link", "real"])


def test_a_folder_is_not_discarded_by_a_path_that_needs_it(tmp_path, monkeypatch):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "real" / "inner")
    with pytest.raises(ConfigError, match=r"cannot replace \.\. from inside it: change to another folder"):
        discard(Path(".."))
    discard(tmp_path / "real")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["link", "here"])
def test_a_run_in_a_linked_folder_or_in_this_one_is_replaced(world, tmp_path, monkeypatch, way):
    real, out = tmp_path / "real", tmp_path / "link" if way == "link" else Path(".")
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    for more in ((), ("overwrite=true",)):
        run("lora", world, "encoder", out, "steps=1", *more)
        assert RunFolder(real).finished
    assert (tmp_path / "link").is_symlink()


def test_a_file_nested_too_deep_is_damaged(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"x\.json is missing or damaged: maximum recursion") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_yaml_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("a: " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"x\.yaml is nested more than 100 deep"):
        read_yaml(tmp_path / "x.yaml")


def test_causal_rows_learn_the_answer_alone():
    tok = tokenizer(encoder=False)
    rows = [
        data.parse({"task": "a", "prompt": "sort 3 1 :", "completion": "1 3"}, ""),
        data.parse({"task": "b", "prompt": "good ?", "choices": ["yes", "no"], "answer": 1}, ""),
    ]
    first, second = tokenize(rows, tok, ("a", "b"), max_length=16)
    assert tok.decode(first["input_ids"]) == "sort 3 1 : 1 3 <eos>"
    assert [i for i in first["labels"] if i >= 0] == tok("1 3")["input_ids"] + [tok.eos_token_id]
    assert second["labels"][-2:] == [tok.convert_tokens_to_ids("no"), tok.eos_token_id]
    batch = CausalCollator(0, task_ids=True)([first, second])
    assert batch["routing_task_ids"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(first["input_ids"]), len(second["input_ids"])]
    assert "routing_task_ids" not in CausalCollator(0)([first])


def test_a_long_row_loses_its_prompts_start_first():
    row = [1, 2, 3, 4, 5]
    for labels, room, kept in (
        ([-100, -100, -100, 4, 5], 4, [2, 3, 4, 5]),
        ([-100, -100, -100, 4, 5], 2, [4, 5]),
        ([-100, -100, -100, 4, 5], 1, [4]),
        ([-100, 2, -100, 4, -100], 3, [2, 3, 4]),
        ([-100, 2, -100, 4, -100], 9, [1, 2, 3, 4]),
    ):
        assert row[fitting(labels, room)] == kept


def test_encoder_rows_hold_question_and_choices_in_parts():
    tok = tokenizer(encoder=True)
    rows = [
        data.parse({"task": "q", "prompt": "a b", "choices": ["c", "d e"], "answer": 1}, ""),
        data.parse({"task": "q", "prompt": "a", "choices": ["f", "g", "h"], "answer": 0}, ""),
        data.parse({"task": "s", "prompt": "good", "choices": ["no", "yes"], "answer": 1}, ""),
    ]
    layout = Layout.of(rows)
    assert layout.labels == {"s": ("no", "yes")} or set(layout.labels) == {"s"}
    batch = EncoderCollator(tok, layout, task_ids=True)(rows)
    assert batch["segments"][0].tolist()[:9] == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert batch["heads"].tolist() == [-1, -1, 0]
    assert batch["routing_task_ids"].tolist() == [0, 0, 1]
    short = EncoderCollator(tok, layout, max_length=8)(rows[:1])
    assert short["input_ids"].shape[1] == 8
    with pytest.raises(DataError, match="do not fit max_length=5"):
        EncoderCollator(tok, layout, max_length=5)(rows[:1])
    with pytest.raises(DataError, match="was trained on the labels"):
        layout.head(data.parse({"task": "s", "prompt": "p", "choices": ["x", "y"], "answer": 0}, ""))


def test_an_untrained_scorer_is_the_cosine_and_padding_does_not_count(world):
    from moesaic.models.embedded import load_model

    loaded = load_model(str(world / "encoder"))
    rows = data.load(world / "encoder-data", tasks=["pick"])[:3]
    layout = Layout.of(rows)
    model = EncoderForTasks(loaded.model.eval(), layout)
    collate = EncoderCollator(loaded.tokenizer, layout)
    together = model(**collate(rows)).logits
    for i, row in enumerate(rows):
        alone = collate([row])
        logits = model(**alone).logits[0]
        torch.testing.assert_close(together[i, : len(row.choices)], logits[: len(row.choices)])
        states = loaded.model(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state[0]
        parts = [states[alone["segments"][0] == k].mean(0) for k in range(len(row.choices) + 1)]
        cosines = torch.stack([torch.cosine_similarity(parts[0], p, dim=0) for p in parts[1:]])
        torch.testing.assert_close(logits, 20 * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["remove", "garbage", "truncate"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(world, tmp_path, damage):
    out = tmp_path / "run"
    run("lora", world, "encoder", out)
    (out / "results.json").unlink()
    file = out / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"garbage" if damage == "garbage" else file.read_bytes()[:100])
    with pytest.raises(TrainingError, match=f"checkpoint-{STEPS} is damaged .*remove it") as caught:
        run("lora", world, "encoder", out)
    assert "\n" not in str(caught.value)
    shutil.rmtree(file.parent)
    assert run("lora", world, "encoder", out)["resumed_from_step"] == STEPS - 2


def test_where_the_only_checkpoint_is_damaged_no_other_is_promised(world, tmp_path):
    out = tmp_path / "run"
    run("lora", world, "encoder", out, "keep=1")
    (out / "results.json").unlink()
    (out / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt").unlink()
    with pytest.raises(TrainingError, match=r"is damaged .no optimizer\.pt.: overwrite=true trains again"):
        run("lora", world, "encoder", out, "keep=1")


def test_a_run_stopped_after_its_last_checkpoint_is_finished_with_its_loss(world, tmp_path):
    out = tmp_path / "run"
    loss = run("lora", world, "encoder", out)["final_loss"]
    (out / "results.json").unlink()
    (out / "checkpoints" / "checkpoint-\u00b2").mkdir()
    results = run("lora", world, "encoder", out)
    assert (results["resumed_from_step"], results["final_loss"]) == (STEPS, loss)


@pytest.mark.parametrize("file", ["recipe.yaml", "layout.json"])
@pytest.mark.parametrize("content", ["{", "- 1"])
def test_a_damaged_file_of_an_unfinished_run_is_one_line(world, tmp_path, file, content):
    out = tmp_path / "run"
    run("lora", world, "encoder", out)
    (out / "results.json").unlink()
    (out / file).write_text(content)
    with pytest.raises(ConfigError, match=rf"{file}(:2: this is not YAML| must hold| is .*damaged)") as caught:
        run("lora", world, "encoder", out)
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_learned_do_not_cost_the_run_they_would_replace(world, tmp_path):
    out, chats = tmp_path / "run", tmp_path / "chats.jsonl"
    run("lora", world, "causal", out)
    chats.write_text(
        json.dumps({"task": "t", "messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]})
    )
    with pytest.raises(ConfigError, match="no chat template"):
        run("lora", world, "causal", out, f"data={chats}", "overwrite=true")
    assert RunFolder(out).finished


def test_a_place_that_cannot_be_written_is_one_line(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"out=.*run cannot be written: Not a directory"):
        run("lora", world, "encoder", tmp_path / "file" / "run")

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8 vs 4")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"cannot write .*make room"):
        run("lora", world, "encoder", tmp_path / "run")
    assert RunFolder(tmp_path / "run").steps() == []


def test_a_run_whose_parts_do_not_belong_together_is_refused(world, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "run"
    run("lora", world, "encoder", out)
    recipe, weights = out / "recipe.yaml", out / "adapter" / "adapter_model.safetensors"
    text, tensors = recipe.read_text(), load_file(weights)
    recipe.write_text(text.replace("method: lora", "method: mola").split("adapter:")[0])
    with pytest.raises(AdapterError, match=r"LoraConfig, but .* says method=mola"):
        load_run(out)
    recipe.write_text(text)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(AdapterError, match="1 tensors are on one side only"):
        load_run(out)
    save_file({k: v * math.nan for k, v in tensors.items()}, weights)
    with pytest.raises(AdapterError, match="not finite"):
        load_run(out)
    (out / "layout.json").unlink()
    with pytest.raises(ConfigError, match=r"layout\.json is missing or damaged"):
        load_run(out)


@pytest.mark.parametrize(
    ("recipe", "more", "change"),
    [
        ("mola", (), {"top_k": 1}),
        ("mola", (), {"lora_alpha": 7}),
        ("mola", ("adapter.use_rslora=false",), {"use_rslora": True}),
        ("lora", (), {"use_rslora": True}),
        ("dora", (), {"use_dora": False}),
        ("lora", ("adapter.target_modules=query,key",), {"target_modules": ["query"]}),
    ],
)
def test_a_config_that_is_not_the_recipes_is_refused(world, tmp_path, recipe, more, change):
    out = tmp_path / "run"
    run(recipe, world, "encoder", out, "steps=1", *more)
    open_adapter(out)
    file = out / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (key, value), *_ = change.items()
    with pytest.raises(
        AdapterError, match=rf"adapter_config\.json says {key}=.*, but .*says adapter\.{key}="
    ) as caught:
        load_run(out)
    assert f"says {key}={value}," in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("lora", ("adapter.target_modules=All-linear", "adapter.fan_in_fan_out=true", "adapter.lora_alpha=32.0")),
        ("lora", ("adapter.target_modules=value,query", "adapter.modules_to_save=word_embeddings")),
        ("lora", ("match=mola",)),
        ("mola", ("adapter.target_modules=null", "adapter.experts_per_layer=8,4")),
        ("oracle", ("adapter.exclude_modules=query",)),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_settings_that_a_model_fills_in_are_still_the_recipes(world, tmp_path, recipe, more):
    run(recipe, world, "encoder", tmp_path / "run", "steps=1", *more)
    load_run(tmp_path / "run")


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_layout_that_was_changed_is_refused(world, tmp_path, kind):
    out = tmp_path / "run"
    run("lora", world, kind, out, "steps=1")
    stored = read_json(out / "layout.json")
    tasks = stored["tasks"]
    changes = [{"tasks": t} for t in (tasks[::-1], tasks[:1], tasks * 2, ",".join(tasks), [], [1, 2], 3, None)]
    if kind == "encoder":
        changes += [{"labels": labels} for labels in ({"even": "no"}, {"other": ["no", "yes"]}, [], 3)]
    for change in changes:
        (out / "layout.json").write_text(json.dumps(stored | change))
        with pytest.raises(ConfigError, match=r"layout\.json is damaged: .*; restore it, or train again") as caught:
            load_run(out)
        assert "\n" not in str(caught.value)


def test_projecting_the_labelled_tokens_alone_changes_no_gradient():
    from trl.trainer import utils

    from moesaic.training.trainer import labelled_alone

    model = load_model("nano").model
    utils.add_fused_lm_head(model)
    ids = torch.arange(3, 19).view(2, 8)
    labels = torch.where(torch.arange(8) < 5, -100, ids)
    seen: list[int] = []
    apply = utils._ChunkedLogProbFunction.apply

    def watched(hidden, *rest):
        seen.append(len(hidden))
        return apply(hidden, *rest)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils._ChunkedLogProbFunction, "apply", watched)
        for context in (nullcontext(), labelled_alone()):
            with context:
                model.zero_grad()
                loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
            loss.backward()
            found.append((loss, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    assert seen == [14, 6]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
