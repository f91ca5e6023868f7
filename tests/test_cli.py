"""The command line as a person meets it: a subprocess, one line for a mistake, JSON for machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import yaml

from moesaic.cli.main import main
from moesaic.cli.verbs import find
from tests.tiny_folders import save_model, write_tasks


def moesaic(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "moesaic", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_model(root / "model", "encoder")
    write_tasks(root / "data", "encoder")
    return root


def settings(world, out, *more):
    return [f"model={world / 'model'}", f"data={world / 'data'}", f"out={out}", "steps=3", "batch_size=4", *more]


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in find())])
def test_help_teaches_without_importing_torch(arguments):
    code = (
        "import sys\nfrom moesaic.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'rich', 'omegaconf'} & set(sys.modules)\n"
        "print('heavy:', heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "heavy: set()" in out
    assert "key=value" in out or arguments[0] == "methods"


def test_help_groups_the_verbs_and_each_tells_all_its_settings(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    groups = ["mixtures:", "adapters:", "what it costs:"]
    assert [line for line in overview.splitlines() if line in groups] == groups
    for name, known in find().items():
        assert f"  {name:<10} {known.summary}" in overview
        with pytest.raises(SystemExit):
            main([name, "--help"])
        told = capsys.readouterr().out
        assert all(f.name in told for section in known.settings for f in section.fields())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "lora"], "no verb 'trian'; did you mean 'train'? known: demo, methods, "),
        (["--json", "inspekt"], "no verb 'inspekt'; did you mean 'inspect'?"),
        (["demo", "batch_size=4"], "batch_size is a setting of `moesaic train` and `moesaic eval`"),
        (["inspect", "nowhere", "methods=lora"], "methods is a setting of `moesaic compare` and `moesaic bench`"),
        (["train", "lora", "prompt=x"], "prompt is a setting of `moesaic generate` and `moesaic inspect`"),
    ],
)
def test_a_stray_verb_or_setting_is_led_home(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moesaic {metadata.version('moesaic')}\n"


def test_train_and_eval_as_a_user_would(world, tmp_path, capsys):
    out = tmp_path / "run"
    trained = moesaic("train", "lora", *settings(world, out), "--json")
    assert trained.returncode == 0, trained.stderr
    results = json.loads(trained.stdout)
    assert results["run"] == str(out)
    assert results["command"].startswith("moesaic train lora model=")
    assert str(world.parent) not in results["command"].split()[0]
    card = (out / "adapter" / "README.md").read_text()
    assert "lora on" in card
    assert results["command"] in card
    scored = moesaic("eval", out, "limit=5")
    assert scored.returncode == 0, scored.stderr
    for word in ("majority", "base", "even", "pick", "mean", "trainable", f"{results['trainable_parameters']:,}"):
        assert word in scored.stdout
    assert main(["train", "lora", *settings(world, out)]) == 2
    assert "holds a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "lorra", "data=x"], "no recipe 'lorra'; did you mean 'lora'"),
        (["train", "lora", "stps=3"], "unknown key 'stps'; did you mean 'steps'"),
        (["train", "lora", "adapter.rr=3", "data=x"], "no setting adapter.rr; did you mean"),
        (["train", "mola", "adapter.top_k=9", "data=x"], "top_k"),
        (["train", "lora"], "data is missing"),
        (["train", "lora", "data=nowhere.jsonl"], "no such file or folder: nowhere.jsonl"),
        (
            ["train", "topiclora", "adapter.topics=nowhere.safetensors", "--dry-run"],
            "no topics file nowhere.safetensors",
        ),
        (["topics", "show", "out=/dev/null/graph.svg"], "out=/dev/null/graph.svg: there is no folder /dev/null"),
        (["topics", "build", "seed=10000000000000000000000", "encoder=hashing"], "must be between 0 and 4294967295"),
        (["topics", "build", "--json", "a=b"], "unknown key 'a'"),
        (["topics", "show", "-v", "nowhere.safetensors"], "no topics file nowhere.safetensors"),
        (["eval", "nowhere", "--json", "lmit=3"], "did you mean 'limit'"),
        (["--json", "eval", "nowhere"], "is not a run folder"),
        (["topics", "show", "~nouser/x"], "~nouser: no such user; write the whole path of ~nouser/x"),
        (["train", "~nouser/my.yaml"], "~nouser: no such user"),
        (["train", "lora", "out=~nouser/run", "data=x"], "~nouser: no such user"),
        (["train", "topiclora", "adapter.topics=~nouser/x", "--dry-run"], "~nouser: no such user"),
        (["eval", "limit=3"], "name at least one run folder"),
        (["eval", "nowhere"], "is not a run folder"),
        (["eval", "nowhere", "lmit=3"], "did you mean 'limit'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_a_bad_line_in_the_data_is_one_line(world, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"task": "t", "prompt": "p", "choices": ["a", "b"], "answer": 4}\n')
    assert main(["train", "lora", f"model={world / 'model'}", f"data={file}", f"out={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == f"moesaic: {file}:1: 'answer' is 4, but there are 2 choices (0 to 1)\n"
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_a_recipe_that_can_be_used_and_writes_nothing(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "hotmoe", *settings(world, out), "adapter.num_experts=3", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    file = tmp_path / "again.yaml"
    file.write_text(text)
    assert main(["train", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out == text
    assert "num_experts: 3" in text


def test_dry_run_shows_the_rank_that_match_solves_and_settings_may_follow_options(world, tmp_path, capsys):
    train = ["train", "lora", "match=mola", "--dry-run", *settings(world, tmp_path / "run"), "adapter.lora_alpha=8"]
    assert main(train) == 0
    stored = yaml.safe_load(capsys.readouterr().out)
    assert stored["adapter"]["r"] > 16
    assert stored["adapter"]["lora_alpha"] / stored["adapter"]["r"] == 8 / 16
    with pytest.raises(SystemExit) as stop:
        main(["train", "lora", "--dry-run", "steps=3", "--fast"])
    assert stop.value.code == 2


def test_flags_may_stand_anywhere(capsys):
    for arguments in (["--json", "methods", "mola"], ["methods", "--json", "mola"], ["methods", "mola", "--json"]):
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["method"] == "mola"


def test_methods_lists_every_registered_one(capsys):
    from moesaic.lora import METHODS

    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    inside = {f"convert/{name}" for name in ("cmoe", "read-me", "rmoe", "smoe-dropout")}
    assert {row["method"] for row in rows} == {"lora", "rslora", "dora", *METHODS, *inside}
    assert all(row["summary"] and row["paper"] for row in rows)
    assert main(["methods"]) == 0
    assert "hotmoe" in capsys.readouterr().out


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    import moesaic.training.run

    def interrupted(recipe):
        raise KeyboardInterrupt("stopped at step 3 of 6, saved; the same command goes on from there")

    monkeypatch.setattr(moesaic.training.run, "train", interrupted)
    assert main(["train", "lora", "data=x"]) == 130
    assert capsys.readouterr().err.startswith("moesaic: stopped at step 3")


def test_being_asked_to_end_is_an_interrupt(monkeypatch, capsys):
    import moesaic.training.conversion

    def terminated(wanted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(moesaic.training.conversion, "convert", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["convert", "cmoe", "model=nano", "domains=prose"]) == 130
    assert capsys.readouterr().err == "moesaic: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_scored_where_one_of_the_runs_is_damaged(world, tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert main(["train", "lora", *settings(world, good)]) == 0
    shutil.copytree(good, bad)
    (bad / "layout.json").unlink()
    capsys.readouterr()
    for broken in (bad, tmp_path / "nowhere"):
        assert main(["eval", str(good), str(broken), "limit=2"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not list(good.glob("eval-*"))
