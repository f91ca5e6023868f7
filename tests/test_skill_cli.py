"""`moesaic skill` as people type it, its pages and films, and what it says to what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.runs.recipe import PACKAGED
from moesaic.runs.settings import read_yaml
from moesaic.skills.body import Body, _check, load_body
from moesaic.skills.names import SKILLS, TASKS
from moesaic.skills.running import load_run
from moesaic.skills.saving import load, save
from moesaic.skills.tasks import SKILLS as SKILLS_MADE
from moesaic.skills.tasks import TASKS as TASKS_MADE

QUICK = ["num_envs=8", "hidden=16", "critic_hidden=16", "ppo.steps=8", "ppo.minibatches=2", "steps=64"]


def said(capsys: pytest.CaptureFixture[str], *line: str, code: int = 0) -> str:
    assert main(["skill", *line]) == code
    told = capsys.readouterr()
    return told.out if code == 0 else told.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    for name in ("walk", "reach"):
        assert main(["skill", "train", f"task={name}", f"out={place / name}", *QUICK]) == 0
    skills = f"skills={place / 'walk'},{place / 'reach' / 'model'}"
    assert main(["skill", "blend", "task=far_reach", skills, f"out={place / 'blend'}", *QUICK]) == 0
    return place


def test_the_names_are_the_tasks() -> None:
    assert tuple(SKILLS_MADE) == SKILLS
    assert tuple(TASKS_MADE) == TASKS
    assert all(set(task.skills) <= set(SKILLS) and len(task.skills) > 1 for task in TASKS_MADE.values())


@pytest.mark.parametrize("file", sorted((PACKAGED / "skills").glob("*/*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_holds_what_is_not_given(file: Path) -> None:
    body, task = file.parent.name, file.stem
    own = read_yaml(file)
    made = asdict(load_run([f"task={task}", f"body={body}"], blends=False))
    assert own
    assert {name: made[name] for name in own} == own
    assert load_run([f"task={task}", f"body={body}", "steps=5"], blends=False).steps == 5


def test_runs_are_measured_and_their_pages_show_weights(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = json.loads(said(capsys, "eval", str(runs / "blend"), "rollouts=4", "seconds=1", "--json"))
    assert found["skills"] == ["walk", "reach"]
    weights = np.array(found["weights"])
    assert weights.shape == (24, 10, 2)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    use = np.array([*found["routing"]["utilisation"].values()])
    np.testing.assert_allclose(use, weights.mean(axis=0), atol=0.05)
    page = (runs / "blend" / "report.html").read_text()
    assert "Which skill each joint listens to" in page
    assert "left_hip" in page
    file = runs / "both.html"
    both = said(capsys, "eval", str(runs / "walk"), str(runs / "reach"), "rollouts=2", "seconds=0.5", f"out={file}")
    assert "velocity error, m/s" in both
    assert f"side by side: {file}" in both
    page = file.read_text()
    assert "wrist error, m" in page
    assert "flat on walk, reach" in page


def test_a_film_is_a_rollout(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "play", str(runs / "blend"), "seconds=1", "stick=true")
    assert f"written: {runs / 'blend' / 'film.gif'}" in told
    with Image.open(runs / "blend" / "film.gif") as film:
        shown = [film.seek(number) or film.info["duration"] for number in range(film.n_frames)]
    assert sum(shown) == 1000, "pictures that are alike may be one that lasts"
    assert len(shown) > 5
    said(capsys, "play", str(runs / "walk"), "seconds=0.4", f"out={runs / 'walk.mp4'}", "stick=true")
    assert (runs / "walk.mp4").stat().st_size > 1000
    told = said(capsys, "play", str(runs / "walk"), "seconds=500", f"out={runs / 'long.gif'}", code=2)
    assert "seconds=500: a GIF holds 120 s" in told
    assert "out=film.avi must end in .gif or .mp4" in said(capsys, "play", str(runs / "walk"), "out=film.avi", code=2)


def test_a_policy_is_exported(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    assert "policy.onnx" in said(capsys, "export", str(runs / "walk"))
    assert (runs / "walk" / "policy.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["fly"], "no such action; known: blend, eval, export, play, train"),
        (["train"], "task is missing: task=walk"),
        (["train", "task=wlak"], "did you mean 'walk'"),
        (["train", "task=walk", "setps=3"], "did you mean 'steps'"),
        (["train", "task=walk", "steps=0"], "steps=0 must be at least 1"),
        (["train", "task=walk", "hidden=0"], "must be above 0"),
        (["train", "task=walk", "seed=99999999999999999999999"], "must be at least 0 and at most"),
        (["train", "task=walk", "init_std=nan"], "init_std=nan must be at least"),
        (["train", "task=walk", "body=null"], "body is empty: leave it out"),
        (["train", "task=walk", "kind=mcp"], "kind is a blend's"),
        (["train", "task=walk", "ppo.steps=0"], "ppo.steps=0 must be at least 1"),
        (["train", "task=walk", "ppo.average=2"], "ppo.average=2.0 must be at least 0"),
        (["train", "task=walk", "ppo.gamma=nan"], "ppo.gamma=nan must be at least 0"),
        (["train", "task=walk", "ppo.steps=1.5"], "ppo.steps=1.5 must be a whole number"),
        (["train", "task=walk", "ppo.lrr=1"], "did you mean 'lr'"),
        (["train", "task=walk", "body=nobody"], "no body nobody"),
        (["train", "task=walk", "skills=a"], "`moesaic skill blend` takes skills"),
        (["blend", "task=far_reach"], "skills=runs/walk-flat-s0,runs/reach-flat-s0"),
        (["blend", "task=far_reach", "skills="], "skills is missing"),
        (["blend", "task=far_reach", "skills=nowhere"], "nowhere holds no policy"),
        (["blend", "task=far_reach", "skills=a", "kind=sum"], "kind=sum"),
        (["eval"], "no run is given"),
        (["eval", "nowhere"], "nowhere holds no policy"),
        (["play", "a", "b"], "one run at a time"),
        (["play", "a", "seconds=inf"], "seconds=inf must be at least 0"),
        (["play", "a", "rollouts=5"], "rollouts does nothing in `moesaic skill play`"),
        (["eval", "a", "stick=true"], "stick does nothing in `moesaic skill eval`"),
        (["eval", "a", "out=report.pdf"], "must end in .html"),
        (["train", "wlak"], "no skill or task wlak; did you mean 'walk'"),
    ],
)
def test_bad_input_is_one_line(
    line: list[str], wanted: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said(capsys, *line, code=2)
    assert wanted in told
    assert len(told.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_policy_of_another_body_or_task_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["blend", "task=far_reach", f"skills={runs / 'walk'}", "body=humanoid", f"out={runs / 'no'}", *QUICK]
    told = said(capsys, *line, code=2)
    assert "is for another body: 10 joints, and this one has 19" in told
    assert not (runs / "no").exists()
    told = said(capsys, "eval", str(runs / "walk"), "task=reach", code=2)
    assert "takes 1 numbers for a command, and reach gives 4" in told


def test_what_is_no_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    mine = tmp_path / "model" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of it")
    (tmp_path / "settings.json").write_text("{}")
    told = said(capsys, "train", "task=walk", f"out={tmp_path}", "overwrite=true", *QUICK, code=2)
    assert "holds files that are not a skill's run's" in told
    with pytest.raises(ConfigError, match="holds files that are not a policy's"):
        save(load(runs / "walk"), mine.parent, {})
    assert mine.read_text() == "years of it"


def test_a_run_that_does_not_exist_is_told_before_others_are_measured(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = runs / "reach" / "report.html"
    report.unlink(missing_ok=True)
    assert "nowhere holds no policy" in said(capsys, "eval", str(runs / "reach"), "nowhere", "seconds=0.2", code=2)
    assert not report.exists()


def test_pages_that_cannot_be_written_are_told_before_anything_is_measured(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "walk", tmp_path / "walk")
    mine = tmp_path / "walk" / "report.html"
    mine.write_text("<p>my notes</p>")
    told = said(capsys, "eval", str(tmp_path / "walk"), "seconds=0.1", "rollouts=1", code=2)
    assert "report.html is already there, and is no page of `moesaic skill`: move it" in told
    assert mine.read_text() == "<p>my notes</p>"
    page = tmp_path / "new" / "page.html"
    said(capsys, "eval", str(runs / "walk"), "seconds=0.1", "rollouts=1", f"out={page}")
    assert page.is_file()


def test_a_damaged_manifest_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"task": "walk", "settings": {"body": "mini_humanoid"}}
    changes = [{"trained": told | {"steps": steps}} for steps in ("9", None, [], 1.5)]
    for change in (*changes, {"trained": [1]}, {"trained": {**told, "settings": {"body": 5}}}, {"bounds": [1, 2, 3]}):
        place = tmp_path / "copy"
        shutil.copytree(runs / "walk" / "model", place, dirs_exist_ok=True)
        file = place / "policy.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert "is damaged" in said(capsys, "eval", str(place), "seconds=0.2", code=2)


def test_folders_of_files_are_made(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "new" / "film.gif"
    assert str(film) in said(capsys, "play", str(runs / "walk"), f"out={film}", "seconds=0.1", "stick=true")
    assert [file.name for file in film.parent.iterdir()] == ["film.gif"]
    (tmp_path / "isdir.onnx").mkdir()
    assert "cannot write" in said(capsys, "export", str(runs / "walk"), f"out={tmp_path / 'isdir.onnx'}", code=2)


def test_the_manifest_of_the_page_is_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "skillblender.md").read_text()
    told = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
    known = {f.name: f for f in fields(Body)}
    assert told.keys() <= known.keys()
    assert {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING} <= told.keys()
    _check(Body(**told), Path("robot.yaml"))


def test_a_body_that_does_not_stand_is_told_so() -> None:
    for name in ("mini_humanoid", "humanoid"):
        assert load_body(name).fault() == ""
    body = load_body("mini_humanoid")
    assert "its base is at 0.6" in replace(body, kp=[gain / 50 for gain in body.kp]).fault()
    assert "gains, default and base_height must fit" in replace(body, base_height=0.5).fault()


def test_settings_are_shown_and_help_is_of_the_action(capsys: pytest.CaptureFixture[str]) -> None:
    assert "steps: 600000" in said(capsys, "train", "walk", "--dry-run")
    cases = ("play", "stick", "init_std"), ("train", "init_std", "stick"), ("eval", "rollouts", "stick")
    for action, there, not_there in cases:
        with pytest.raises(SystemExit):
            main(["skill", action, "--help"])
        told = capsys.readouterr().out.partition("settings of")[2]
        assert f"  {there} " in told
        assert f"  {not_there} " not in told
