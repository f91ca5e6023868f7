"""`moesaic stream`: runs that go on, comparisons that keep what is done, and pages that show it."""

from __future__ import annotations

import gzip
import json
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import moesaic.trees
from moesaic.cli.main import main
from moesaic.errors import ConfigError
from moesaic.report.streams_compared import comparison_page
from moesaic.trees import comparing, learners, load
from moesaic.trees.comparison import StreamComparison
from moesaic.trees.driftmoe import DriftMoE
from moesaic.trees.learners import OURS, known, learner
from moesaic.trees.streams import open_stream, synthetic
from moesaic.trees.summary import ranks, summarised

TINY = ["model.n_experts=4", "model.hidden=16", "model.batch_size=32"]


def said(capsys: pytest.CaptureFixture[str], *line: str, code: int = 0) -> str:
    found = main(["stream", *line])
    out, err = capsys.readouterr()
    assert found == code, err
    return out if code == 0 else err


def ran(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_a_run_leaves_figures_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    told = said(capsys, "run", "stream=sea_a", "length=4000", f"out={out}", *TINY)
    found = ran(out)
    assert f"accuracy {100 * found['accuracy']:.2f} %" in told
    assert found["rows"] == 4000
    assert [drift["position"] for drift in found["drifts"]] == [1000, 2000, 3000]
    assert len(found["windows"]) == len(found["activity"]) == 4
    assert sum(map(sum, (w["chosen"] for w in found["activity"]))) == pytest.approx(4000)
    page = (out / "report.html").read_text()
    assert "Accuracy over the stream" in page
    assert page.count('<g class="mark">') == 2 * 3, "drifts, wide and narrow"
    assert "Who does what" in page
    assert "src=" not in page
    again = load(out / "model")
    assert again.labels == [0, 1]
    assert sum(again.predict_proba_one(dict.fromkeys(again.places, 1.0)).values()) == pytest.approx(1)
    again = said(capsys, "run", "stream=sea_a", "length=4000", f"out={out}", *TINY, code=2)
    assert "holds a finished run; overwrite=true replaces it" in again
    said(capsys, "run", "stream=sea_a", "length=2000", f"out={out}", "learner=nochange", "overwrite=true")
    assert ran(out)["rows"] == 2000


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["run", "stream=led_a", "length=3000", "every=500", "delay=3", *TINY]
    said(capsys, *line, f"out={tmp_path / 'a'}")
    learn = DriftMoE.learn

    def stops(self: DriftMoE, *row: Any) -> None:
        if self.rows == 1700:
            raise KeyboardInterrupt
        learn(self, *row)

    with monkeypatch.context() as patch:
        patch.setattr(DriftMoE, "learn", stops)
        assert main(["stream", *line, f"out={tmp_path / 'b'}"]) == 130
    capsys.readouterr()
    other = said(capsys, *line, f"out={tmp_path / 'b'}", "seed=1", code=2)
    assert "unfinished run with seed=0, now 1" in other
    said(capsys, *line, f"out={tmp_path / 'b'}")
    one, two = ran(tmp_path / "a"), ran(tmp_path / "b")
    for name in ("accuracy", "kappa", "kappa_m", "kappa_t", "windows", "drifts", "activity"):
        assert one[name] == two[name], name


def test_a_file_is_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i % 7},{i % 5},{'yes' if i % 7 > 3 else 'no'}" for i in range(600)]
    rows[300] = "1,2"
    with gzip.open(tmp_path / "sensors.csv.gz", "wt") as file:
        file.write("a,b,state\n" + "\n".join(rows) + "\n")
    line = ["run", f"stream={tmp_path / 'sensors.csv.gz'}", "source.target=state", f"out={tmp_path / 'run'}", *TINY]
    refused = said(capsys, *line, code=2)
    assert "sensors.csv.gz:302" in refused
    assert "source.on_bad_rows=skip leaves such rows out" in refused
    told = said(capsys, *line, "source.on_bad_rows=skip")  # nothing was learned before: nothing is replaced
    assert "1 rows were malformed, and left out; the first: " in told
    assert "sensors.csv.gz:302: it has 2 fields" in told
    assert "labels: column state, 2 classes" in told
    found = ran(tmp_path / "run")
    assert (found["rows"], found["skipped"]) == (599, 1)
    assert {*found["classes"]} == {"yes", "no"}
    assert found["accuracy"] > 0.9


def test_capymoas_learners_are_told_the_classes_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"{i},{'abc'[i // 40]}\n" for i in range(120))
    (tmp_path / "late.csv").write_text(f"x,label\n{rows}")
    monkeypatch.setattr(learners, "rival", lambda name, classes, features, **_: (name, [*classes], [*features]))
    stream = open_stream(str(tmp_path / "late.csv"))
    assert learner("capymoa-arf", stream) == ("arf", ["a", "b", "c"], ["x"])
    assert learner("capymoa-arf", open_stream(str(tmp_path / "late.csv"), 60))[1] == ["a", "b"], "no row behind them"
    with pytest.raises(ConfigError, match="did you mean 'capymoa-arf'"):
        learner("capymoa-arff", stream)


def test_a_comparison_keeps_what_is_done_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "streams=sea_a,stagger", "learners=driftmoe,majority", "seeds=0,1", "length=1200"]
    line += [f"out={tmp_path / 'c'}", *(part.replace("model.", "model.driftmoe.") for part in TINY)]
    assert main(["stream", *line]) == 0
    told, progress = capsys.readouterr()
    assert "8 of 8: stagger, majority, seed 1" in progress
    assert "Accuracy, percent" in told
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert found["ranks"] == {"driftmoe": 1.0, "majority": 2.0}
    assert found["table"]["sea_a"]["driftmoe"]["accuracy"]["sd"] > 0
    assert found["drifts"]["sea_a"] == [300, 600, 900]
    assert main(["stream", *line]) == 0
    assert "1 of" not in capsys.readouterr().err, "what is there is not run again"
    one = next((tmp_path / "c" / "cells").glob("sea_a--majority-s1-*.json"))
    one.write_text('{"stream": "sea_a"}')
    assert main(["stream", *line]) == 0
    assert "1 of 1: sea_a, majority, seed 1" in capsys.readouterr().err, "a damaged cell is run again"
    sound = json.loads(one.read_text())
    other = next((tmp_path / "c" / "cells").glob("sea_a--majority-s0-*.json"))
    for wrong in (sound | {"windows": [{"start": 0, "rows": 9, "accuracy": []}]}, sound | {"cpu_seconds": "x"},
                  sound | {"drifts": [3]}, json.loads(other.read_text())):  # fmt: skip
        one.write_text(json.dumps(wrong))
        assert main(["stream", *line]) == 0
        assert "1 of 1: sea_a, majority, seed 1" in capsys.readouterr().err
    assert "did you mean 'nochange'" in said(capsys, *line, "learners=driftmoe,nochang", code=2)
    assert main(["stream", *line, "learners=driftmoe,majority,nochange"]) == 0
    assert "1 of 4: sea_a, nochange, seed 0" in capsys.readouterr().err
    assert "holds a comparison with window=1000, now 100" in said(capsys, *line, "window=100", code=2)
    assert main(["stream", *line, "window=100", "overwrite=true"]) == 0
    assert "1 of " in capsys.readouterr().err
    assert json.loads((tmp_path / "c" / "settings.json").read_text())["window"] == 100
    assert "<title>" in (tmp_path / "c" / "report.html").read_text()


def test_a_page_tells_of_classes_and_of_what_naming_one_of_them_is_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [f"c{i % 25 if i < 500 else i % 4:02}" for i in range(900)]
    (tmp_path / "many.csv").write_text("a,b,label\n" + "".join(f"{i % 7},{i % 5},{c}\n" for i, c in enumerate(labels)))
    line = ["run", f"stream={tmp_path / 'many.csv'}", "learner=nochange"]
    said(capsys, *line, f"out={tmp_path / 'run'}")
    found = ran(tmp_path / "run")
    assert found["baselines"]["nochange"] == found["accuracy"]
    assert {of["class"]: of["came"] for of in found["by_class"]} == {c: labels.count(c) for c in labels}
    assert found["by_class"][1] | {"recall": 0, "precision": 0} == {
        "class": "c01", "came": 120, "predicted": 120, "right": 0, "recall": 0, "precision": 0,
    }  # fmt: skip
    page = (tmp_path / "run" / "report.html").read_text()
    assert "accuracy of the majority class, %" in page
    assert "Classes, the 20 most frequent of 25" in page
    assert '<th scope="row">c19</th>' in page
    assert '<th scope="row">c20</th>' not in page
    older = {name: value for name, value in found.items() if name not in ("baselines", "by_class")}
    (tmp_path / "run" / "results.json").write_text(json.dumps(older))
    said(capsys, "report", str(tmp_path / "run"), f"out={tmp_path / 'older.html'}")
    assert "Classes" not in (tmp_path / "older.html").read_text()


def test_a_comparison_of_which_nothing_was_done_may_change_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "\n".join(f"2026-01-{1 + i % 28:02},{i % 7},{'ab'[i % 2]}" for i in range(60))
    (tmp_path / "dated.csv").write_text(f"when,x,y\n{rows}\n")
    line = ["compare", f"streams={tmp_path / 'dated.csv'}", "learners=nochange", "seeds=0", f"out={tmp_path / 'c'}"]
    assert "leave it out: source.drop=when" in said(capsys, *line, code=1)
    said(capsys, *line, "source.drop=when")
    told = said(capsys, *line, "source.drop=when", "window=7", code=2)
    assert "holds a comparison with window=1000, now 7" in told


def test_a_comparison_shows_recovery_and_what_experts_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "streams=sea_a", "learners=driftmoe,nochange", "seeds=0,1", "length=1200", "window=100"]
    said(capsys, *line, f"out={tmp_path}", *(part.replace("model.", "model.driftmoe.") for part in TINY))
    found = json.loads((tmp_path / "comparison.json").read_text())["recovery"]["sea_a"]
    assert [drift["position"] for drift in found["driftmoe"]] == [300, 600, 900]
    cells = [json.loads(file.read_text()) for file in (tmp_path / "cells").glob("*--driftmoe-*")]
    lowest = [cell["drifts"][1]["lowest"] for cell in cells]
    assert found["driftmoe"][1]["lowest"] == pytest.approx(sum(lowest) / 2)
    page = (tmp_path / "report.html").read_text()
    assert f"→ {50 * sum(lowest):.1f}\n" in page.split("Recovery on sea_a", 1)[1]
    folded = page.split("<details>")[1]
    assert "Who does what on sea_a" in folded
    assert "driftmoe: weight in answers" in folded
    assert "nochange: " not in page


def test_recovery_is_of_the_seeds_that_came_back() -> None:
    def cell(seed: int, rows: int | None, lowest: float | None) -> dict[str, Any]:
        drift = {"position": 500, "before": 0.8, "lowest": lowest, "rows": rows}
        return {"stream": "s", "learner": "a", "seed": seed, "rows": 9, "windows": [], "drifts": [drift]}

    wanted = StreamComparison(streams=["s"], learners=["a"], seeds=[0, 1, 2])
    cells = [cell(0, 300, 0.5), cell(1, None, 0.4), cell(2, 500, 0.3)]
    summary = summarised(cells, wanted, command="x")
    (drift,) = summary["recovery"]["s"]["a"]
    assert drift == pytest.approx({"position": 500, "before": 0.8, "lowest": 0.4, "rows": 400, "back": 2, "seeds": 3})
    assert "80.0 → 40.0\n400 rows, 2 of 3 seeds" in comparison_page(summary)
    never = summarised([cell(0, None, 0.4)], wanted, command="x")
    assert "80.0 → 40.0\nnot back<" in comparison_page(never)


def test_runs_are_reported_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nochange", "majority"):
        said(capsys, "run", "stream=sea_a", "length=2500", f"learner={name}", f"out={tmp_path / name}")
    folders = [str(tmp_path / name) for name in ("nochange", "majority")]
    said(capsys, "report", *folders, f"out={tmp_path / 'both.html'}")
    page = (tmp_path / "both.html").read_text()
    assert "nochange" in page
    assert "majority" in page
    assert "no finished run" in said(capsys, "report", str(tmp_path), code=2)
    whole = json.loads((tmp_path / "majority" / "results.json").read_text())
    for part, wrong in (("accuracy", 10**400), ("settings", []), ("versions", None), ("windows", [{"start": 1e309}])):
        (tmp_path / "majority" / "results.json").write_text(json.dumps({**whole, part: wrong}))
        told = said(capsys, "report", *folders, f"out={tmp_path / 'both.html'}", code=2)
        assert "results.json is damaged" in told
        assert len(told.strip().splitlines()) == 1
    assert (tmp_path / "both.html").read_text() == page


def test_a_report_replaces_pages_of_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    said(capsys, "run", "stream=sea_a", "length=500", "learner=nochange", f"out={run}")
    page = (run / "report.html").read_text()
    mine, folder = tmp_path / "mine.html", tmp_path / "folder.html"
    mine.write_text("<!doctype html><title>mine</title>")
    folder.mkdir()
    for file in (mine, folder):
        told = said(capsys, "report", str(run), f"out={file}", code=2)
        assert f"out={file} is already there, and is no page of `moesaic stream`: name another file" in told
        assert len(told.strip().splitlines()) == 1
    assert mine.read_text() == "<!doctype html><title>mine</title>"
    for _ in range(2):
        said(capsys, "report", str(run), f"out={tmp_path / 'new.html'}")
    said(capsys, "report", str(run), f"out={run / 'report.html'}")
    assert (tmp_path / "new.html").read_text() == (run / "report.html").read_text() == page


@pytest.mark.parametrize("action", ["run", "compare"])
@pytest.mark.parametrize(
    "held",
    [{"report.html": "<title>mine</title>"}, {"settings.json": '{"editor.fontSize": 14}'},
     {"settings.json": "// mine\n{}"}, {"settings.json": "{}", "comparison.json": "{}"}, {"mine.txt": "mine"}],
)  # fmt: skip
def test_a_folder_with_files_of_others_is_let_be(
    action: str, held: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    line = {"run": ["stream=sea_a", "learner=nochange"], "compare": ["streams=sea_a", "learners=nochange", "seeds=0"]}
    ways = [["overwrite=true"], []] if action == "run" else [[]]
    for more in ways:
        told = said(capsys, action, *line[action], "length=100", f"out={tmp_path}", *more, code=2)
        assert "holds files that are not a stream" in told
        assert len(told.strip().splitlines()) == 1
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == held


CELLS = ["compare", "streams=sea_a,stagger", "learners=nochange,majority", "seeds=0", "length=400"]


def figures(folder: Path) -> dict[str, Any]:
    table = json.loads((folder / "comparison.json").read_text())["table"]
    return {s: {name: cell.get("accuracy") for name, cell in of.items()} for s, of in table.items()}


def test_a_cell_that_ray_lost_is_told_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_ray(work: Any, cells: Any) -> Any:
        told = "its task ended: the worker died"
        return closing((c, told if lost == (c.stream, c.learner) else work(c)) for c in cells)

    monkeypatch.setattr(comparing, "on_ray", on_ray)
    lost: Any = ("stagger", "majority")
    assert main(["stream", *CELLS, "engine=ray", f"out={tmp_path / 'ray'}"]) == 1
    assert "stagger, majority, seed 0: its task ended: the worker died\n" in capsys.readouterr().err
    lost = None
    said(capsys, *CELLS, "engine=ray", f"out={tmp_path / 'ray'}")
    said(capsys, *CELLS, f"out={tmp_path / 'local'}")
    assert figures(tmp_path / "ray") == figures(tmp_path / "local")


def test_ray_that_is_not_there_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = said(capsys, *CELLS, "engine=ray", f"out={tmp_path / 'none'}", code=2)
    assert "this needs ray: pip install 'moesaic[ray]'" in told


def test_a_cluster_of_rays_runs_the_same_cells_on_files_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("a,b\n" + "".join(f"{i % 7},{i // 3 % 2}\n" for i in range(400)))
    line = [part.replace("sea_a,stagger", "sea_a,rows.csv") for part in CELLS]
    said(capsys, *line, "out=local")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        said(capsys, *line, "engine=ray", "out=ray")
    finally:
        ray.shutdown()
    assert figures(tmp_path / "ray") == figures(tmp_path / "local")


@pytest.mark.parametrize(
    ("line", "message"),
    [(["run"], "stream is missing"), (["rum"], "did you mean 'run'"),
     (["run", "stream=ledd_a"], "did you mean 'led_a'"),
     (["run", "stream=led_a", "lenght=5"], "did you mean 'length'"), (["run", "stream=led_a", "length=0"], "length=0"),
     (["run", "stream=led_a", "learner=driftmo"], "did you mean 'driftmoe'"),
     (["run", "stream=led_a", "model.n_expert=3"], "did you mean 'n_experts'"),
     (["run", "stream=led_a", "learner=nochange", "model.x=1"], "has no setting x"),
     (["run", "stream=led_a", "learner=river:tree.Nothing"], "river has no tree.Nothing"),
     (["run", "stream=led_a", "learner=river:os.system"], "river has no os.system"),
     (["run", "stream=led_a", "learner=river:forest.ARFClasifier"], "did you mean 'ARFClassifier'"),
     (["compare", "streams=led_a", "learners=capymoa-arff"], "did you mean 'capymoa-arf'"),
     (["run", "stream=led_a", "source.noice=1"], "noice"), (["run", "stream=led_a", "delay=-1"], "delay=-1"),
     (["compare", "streams=led_a", "model.other.x=1"], "model.other: no such learner is compared"),
     (["compare", "streams=led_a", "seeds=0,0"], "seeds has 0 twice"),
     (["compare", "streams=led_a", "source.target=x"], "none of the streams has a setting source.target"),
     (["run", "stream=led_a", "source.seed=1"], "led_a has no setting source.seed"),
     (["run", "stream=led_a", "model.warning=0"], "warning=0 must be a number"),
     (["compare", "streams=led_a", "workers=99999999999999999999"], "is more than 1,000"),
     (["run", "stream=led_a", "window=5000000000000000000"], "window=5000000000000000000 must be 1 or more"),
     (["run", "stream=led_a", "model.history=5000000000000000000"], "history=5000000000000000000 is more than"),
     (["run", "stream=led_a", "learner=river:compose.Pipeline"], "an empty pipeline is no classifier"),
     (["compare"], "streams, learners and seeds each need one"), (["compare", "streams=led_a", "engine=x"], "engine=x"),
     (["report"], "takes folders of finished runs"), (["run", "stream=led_a", "out=full"], "not a stream run's")],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    line: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    told = said(capsys, *line, code=2)
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


def test_learners_are_known_by_name() -> None:
    stream = synthetic("sea_a", length=10)
    for name in OURS:
        given = {"backend": "arrays"} if "task" not in name else {}
        assert isinstance(learner(name, stream, given=given), DriftMoE)
    assert {"nochange", "river-arf", "capymoa-arf"} <= {*known()}
    assert learner("river-hat", stream, seed=3).classifier.seed == 3
    with pytest.raises(ConfigError, match="has no setting depth"):
        learner("river-ht", stream, given={"depth": 3})


def test_equals_share_a_rank_and_a_stream_that_some_lack_counts_for_none() -> None:
    def cell(accuracy: float) -> dict[str, Any]:
        return {"accuracy": {"mean": accuracy}}

    table = {"s": {"a": cell(0.9), "b": cell(0.9), "c": cell(0.5)}, "t": {"a": cell(0.1), "b": cell(0.2)}}
    assert ranks(table, ["a", "b", "c"]) == {"a": 1.5, "b": 1.5, "c": 3.0}
    assert summarised([], StreamComparison(streams=["s"], learners=["a"]), command="x")["ranks"] == {}


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = moesaic.trees.find_spec
    monkeypatch.setattr(moesaic.trees, "find_spec", lambda name: None if name == "numba" else found(name))
    assert "this needs numba: pip install 'moesaic[trees]'" in said(capsys, "run", "stream=led_a", code=2)
    assert "moesaic[trees]" in said(capsys, "compare", "streams=led_a", code=2)
    with pytest.raises(ImportError, match="numba"):
        _ = moesaic.trees.load


def test_a_column_of_measurements_is_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "measured.csv"
    file.write_text("a,humidity\n" + "".join(f"{i % 7},{i / 8}\n" for i in range(300)))
    said(capsys, "run", str(file), "learner=nochange", f"out={tmp_path / 'run'}")
    assert "column 'humidity' has 100 classes already: are those its labels? source.target=" in caplog.text


def test_a_page_of_two_streams_draws_each_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stream in ("led_a", "sea_a"):
        said(capsys, "run", stream, "length=3000", "window=500", "learner=nochange", f"out={tmp_path / stream}")
    file = tmp_path / "both.html"
    said(capsys, "report", str(tmp_path / "led_a"), str(tmp_path / "sea_a"), f"out={file}")
    page = file.read_text()
    assert re.findall(r"<h3>(led_a|sea_a)</h3>", page) == ["led_a", "sea_a"]
    assert "<dt>classes</dt>" not in page


def test_a_run_of_another_kind_is_no_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"task": "walk"}')
    told = said(capsys, "report", str(tmp_path), code=2)
    assert "holds a finished run, but none on a stream" in told
