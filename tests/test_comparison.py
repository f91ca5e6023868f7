"""Comparisons of made-up cells with known answers: scores, differences, verdicts, and the files that are written."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from moesaic.compare import figures as comparison
from moesaic.compare import verdicts
from moesaic.compare.figures import summarise
from moesaic.compare.finished import Cell
from moesaic.errors import ConfigError
from moesaic.lora import METHODS
from moesaic.report import markdown
from moesaic.runs.method import PLAIN, methods
from tests.tiny import FROM_SCRATCH

ROUTING = {
    "entropy": 0.5,
    "dead_share": 0.25,
    "mutual_information": None,
    "inner_balance": 2.0,
    "outer_balance": 0.1,
    "layer_information": 1.0,
    "entropy_by_layer": {"0": 0.4, "1": 0.6},
    "by_layer_and_task": {"0": {"a": [0.5, 0.5]}, "1": {"a": [0.9, 0.1]}},
}


KINDS = {"lora": "plain", "dora": "plain", "rslora": "plain", "uniform": "fixed", "random": "fixed"} | {
    "oracle": "oracle",
    "moelora": "told",
}


def a_cell(arm, method, seed, folder, status="done", error=None):
    return Cell(arm, method, KINDS.get(method, "learned"), "q_proj x 2", seed, 1e-3, status, error, folder)


@pytest.fixture
def make(tmp_path):
    """make(arm, seed, {task: answers}) writes a finished run's files and returns its cell."""

    def cell(arm, seed, correct, *, method=None, matthews=None, routing=None, speed=100.0, data="rows", **results):
        folder = tmp_path / f"{arm}-{seed}"
        folder.mkdir()
        scores = {t: {"metric": "accuracy", "n": len(c), "score": sum(c) / len(c)} for t, c in correct.items()}
        for task, value in (matthews or {}).items():
            scores[task] |= {"matthews": value, "majority": 0.7, "base_matthews": 0.0, "base_score": 0.3}
        lines = [
            {"task": t, "index": i, "correct": bool(x), "predicted": 0}
            for t, c in correct.items()
            for i, x in enumerate(c)
        ]
        found = {"tasks": scores, "routing": routing, "data_sha256": data}
        found["mean"] = sum(s["score"] for s in scores.values()) / len(scores)
        (folder / "eval-test.json").write_text(json.dumps(found))
        (folder / "predictions-test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
        (folder / "results.json").write_text(
            json.dumps({"trainable_parameters": 1000, "tokens_per_second": speed, "versions": {}} | results)
        )
        return a_cell(arm, method or arm, seed, folder)

    return cell


def whole(cells, baseline="lora"):
    return summarise(cells, baseline=baseline, split="test", settings={"model": "nano"})


def arm(summary, name):
    return next(a for a in summary["arms"] if a["arm"] == name)


def test_scores_are_averaged_over_seeds_and_compared_in_pairs(make):
    summary = whole(
        [
            make("lora", 0, {"a": [1, 0, 0, 0], "b": [1, 0]}),
            make("lora", 1, {"a": [1, 1, 0, 0], "b": [1, 0]}),
            make("mola", 0, {"a": [1, 1, 0, 0], "b": [1, 0]}),
            make("mola", 1, {"a": [1, 1, 1, 1], "b": [1, 1]}),
        ]
    )
    lora, mola = arm(summary, "lora"), arm(summary, "mola")
    assert lora["scores"]["a"] == {"mean": 0.375, "sd": pytest.approx(0.25 / math.sqrt(2)), "values": [0.25, 0.5]}
    assert lora["mean"] == pytest.approx((0.375 + 0.5) / 2)
    assert lora["difference"] is None
    assert mola["difference"]["values"] == pytest.approx([0.125, 0.5])
    assert mola["difference"]["mean"] == pytest.approx(mola["mean"] - lora["mean"])
    assert mola["difference"]["by_task"]["a"]["mean"] == pytest.approx(0.375)
    low, high = mola["difference"]["interval"]
    assert low < mola["difference"]["mean"] < high
    assert mola["mean_relative_difference"] == pytest.approx(100 * (0.375 / 0.375 + 0.25 / 0.5) / 2)
    assert summary["seeds"] == [0, 1]


def test_equal_answers_have_an_interval_without_width(make):
    rows = {"a": [1, 0, 1, 0, 0]}
    summary = whole([make("lora", 0, rows), make("mola", 0, rows)])
    assert arm(summary, "mola")["difference"]["interval"] == (0.0, 0.0)
    assert arm(summary, "mola")["sd"] is None


def test_rows_are_paired_by_index_not_by_line(make):
    """Both arms are right on half of the rows: on the same ones the interval is a point, on others it is wide."""
    half = {"a": [1, 0] * 20}
    summary = whole([make("lora", 0, half), make("same", 0, half), make("other", 0, {"a": [0, 1] * 20})])
    assert arm(summary, "same")["difference"]["interval"] == (0.0, 0.0)
    low, high = arm(summary, "other")["difference"]["interval"]
    assert (low, high) == pytest.approx((-0.3, 0.3), abs=0.06)


def test_only_seeds_that_both_have_are_compared(make):
    summary = whole([make("lora", 0, {"a": [0, 0]}), make("lora", 1, {"a": [1, 1]}), make("mola", 1, {"a": [1, 1]})])
    assert arm(summary, "mola")["difference"]["seeds"] == [1]
    assert arm(summary, "mola")["difference"]["mean"] == 0
    other = whole([make("lora", 5, {"a": [0, 0]}), make("mola", 6, {"a": [1, 1]})])
    assert arm(other, "mola")["difference"] is None


def test_costs_and_routing_are_averaged(make):
    summary = whole(
        [
            make("lora", 0, {"a": [1]}, speed=100.0),
            make("mola", 0, {"a": [1]}, speed=70.0, peak_memory_mib=10, routing=ROUTING),
            make("mola", 1, {"a": [0]}, speed=90.0, peak_memory_mib=30, routing=ROUTING | {"entropy": 0.7}),
        ]
    )
    mola = arm(summary, "mola")
    assert mola["overhead"] == pytest.approx(0.25)
    assert mola["peak_memory_mib"] == 20
    assert mola["routing"]["entropy"] == pytest.approx(0.6)
    assert mola["routing"]["mutual_information"] is None
    assert mola["routing"]["entropy_by_layer"] == {"0": 0.4, "1": 0.6}
    assert arm(summary, "lora")["routing"] is None
    assert arm(summary, "lora")["peak_memory_mib"] is None


def test_every_column_of_the_routing_is_explained(make):
    table = markdown(whole([make("lora", 0, {"a": [1]}), make("mola", 0, {"a": [1]}, routing=ROUTING)]))
    (header,) = [line for line in table.splitlines() if line.startswith("| arm | entropy")]
    for column in header.strip("| ").split(" | ")[1:]:
        assert f"- *{column}*: " in table


def test_the_curve_is_the_task_loss_over_stretches_of_steps(make):
    cell = make("lora", 0, {"a": [1]})
    rows = [{"step": i + 1, "loss": 2.5 if i < 60 else 1.5, "router_aux_loss": 0.5} for i in range(120)]
    (cell.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curve = arm(whole([cell]), "lora")["curve"]
    assert len(curve) == comparison.CURVE_POINTS
    assert [loss for _, loss in curve] == [2.5] * 30 + [1.5] * 30
    assert curve[0][0] == 1.5
    assert curve[-1][0] == 119.5


def test_matthews_is_shown_where_a_class_dominates(make):
    summary = whole([make("lora", 0, {"a": [1, 0], "b": [1, 0]}, matthews={"b": 0.25})])
    assert summary["tasks"]["b"]["dominated"]
    assert not summary["tasks"]["a"]["dominated"]
    text = comparison_text(summary)
    assert "50.0, MCC 0.25" in text
    assert "30.0, MCC 0.00" in text
    assert "70.0" in text, "the commonest label's share"
    assert text.count("MCC") == 2


def comparison_text(summary):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison.table(summary))
    return console.export_text()


def test_cells_without_a_result_are_listed_with_the_reason(make, tmp_path):
    damaged = make("mola", 0, {"a": [1]})
    (damaged.folder / "predictions-test.jsonl").unlink()
    short = make("mola", 1, {"a": [1, 1]})
    (short.folder / "predictions-test.jsonl").write_text('{"task": "a", "index": 0, "correct": true, "predicted": 1}\n')
    failed = a_cell("mola", "mola", 2, tmp_path / "none", "failed", "loss is nan")
    later = a_cell("dora", "dora", 0, tmp_path / "none", "pending")
    summary = whole([make("lora", 0, {"a": [1]}), damaged, short, failed, later])
    reasons = {(m["arm"], m["seed"]): m for m in summary["missing"]}
    assert reasons["mola", 2]["error"] == "loss is nan"
    assert "predictions-test.jsonl is missing or damaged" in reasons["mola", 0]["error"]
    assert "its rows are not those of eval-test.json" in reasons["mola", 1]["error"]
    assert reasons["dora", 0]["status"] == "pending"
    assert {a["arm"]: a["status"] for a in summary["arms"]} == {"lora": "done", "mola": "failed", "dora": "pending"}
    assert "mola, seed 2: failed: loss is nan" in comparison_text(summary)


def test_runs_scored_on_different_rows_are_not_compared(make):
    cells = [make("lora", 0, {"a": [1]}), make("mola", 0, {"a": [1]}, data="others")]
    with pytest.raises(ConfigError, match="were scored on different rows: run `moesaic eval` on both again"):
        whole(cells)


def test_four_files_are_written_whole(make, tmp_path):
    cells = [make(name, s, {"a": [1, s], "b": [0, 1]}) for name in ("lora", "mola") for s in (0, 1)]
    summary = whole(cells)
    out = tmp_path / "out"
    out.mkdir()
    comparison.write(out, summary)
    assert sorted(p.name for p in out.iterdir()) == ["comparison.json", "report.html", "table.csv", "table.md"]
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(summary, allow_nan=False))
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 2 * 2 * 2
    assert rows[0] == {
        "arm": "lora", "method": "lora", "seed": "0", "lr": "0.001", "task": "a", "metric": "accuracy", "n": "2",
        "score": "0.5", "matthews": "",
    }  # fmt: skip
    assert [r["score"] for r in rows if r["arm"] == "mola" and r["task"] == "a"] == ["0.5", "1.0"]
    table = (out / "table.md").read_text()
    assert "| lora | 62.5 ± 17.7 |  |  | 75.0 ± 35.4 | 50.0 ± 0.0 |" in table
    assert "- *±*: one standard deviation over seeds" in table
    assert "*to lora [95 %]*: difference of the means in points; in brackets 95 %" in table
    assert (
        "- mola: not decided whether routing helps: there is no arm with a gate that learns nothing on the same modules"
        in table
    )


def test_nothing_finished_is_still_a_comparison(tmp_path):
    cells = [a_cell("lora", "lora", 0, tmp_path, "failed", "out of memory")]
    summary = whole(cells)
    comparison.write(tmp_path, summary)
    assert "out of memory" in (tmp_path / "report.html").read_text()
    assert summary["tasks"] == {}


def test_figures_against_the_baseline_are_over_common_seeds(make):
    summary = whole([make("lora", 0, {"a": [1, 0]}), make("lora", 1, {"a": [1, 1]}), make("mola", 1, {"a": [1, 1]})])
    assert arm(summary, "mola")["difference"]["mean"] == 0
    assert arm(summary, "mola")["mean_relative_difference"] == 0


def test_without_a_common_seed_there_is_no_figure_against_the_baseline(make):
    summary = whole([make("lora", 0, {"a": [1, 0]}), make("mola", 1, {"a": [1, 1]})])
    assert arm(summary, "mola")["difference"] is None
    assert arm(summary, "mola")["mean_relative_difference"] is None


def test_every_device_and_version_is_named(make):
    here = make("lora", 0, {"a": [1]}, device="cpu", versions={"torch": "2.13"})
    there = make("lora", 1, {"a": [1]}, device="cuda", versions={"torch": "2.14", "peft": "0.21"})
    summary = whole([here, there])
    assert summary["device"] == "cpu; cuda"
    assert summary["versions"] == {"torch": "2.13; 2.14", "peft": "0.21"}


# -- verdicts ----------------------------------------------------------------------------------------------------------


def judged(means, methods=None, parameters=None, modules=None, baseline="lora"):
    arms = [
        {
            "arm": name,
            "method": (method := (methods or {}).get(name, name)),
            "kind": KINDS.get(method, "learned"),
            "modules": (modules or {}).get(name, "q_proj x 2"),
            "seeds": list(range(len(values))),
            "values": values,
            "trainable_parameters": (parameters or {}).get(name),
        }
        for name, values in means.items()
    ]
    found = verdicts.verdicts(arms, baseline)
    return {v["arm"]: v for v in found}


LORA, UNIFORM = [0.50, 0.52, 0.54], [0.51, 0.52, 0.53]


@pytest.mark.parametrize(
    ("means", "holds"),
    [
        ([0.60, 0.62, 0.64], True),
        ([0.60, 0.52, 0.54], False),
        ([0.50, 0.52, 0.54], False),
        ([0.40, 0.42, 0.44], False),
    ],
)
def test_routing_helps_only_beyond_two_standard_deviations_of_paired_differences(means, holds):
    found = judged({"lora": LORA, "uniform": UNIFORM, "mola": means})["mola"]
    assert found["holds"] is holds
    assert ("no sign that routing helps" in found["text"]) is not holds


@pytest.mark.parametrize(
    ("means", "worse"),
    [
        ([0.40, 0.42, 0.44], ["lora", "uniform"]),
        ([0.50, 0.42, 0.54], []),
        ([0.505, 0.515, 0.525], ["uniform"]),
        ([0.60, 0.62, 0.64], []),
    ],
)
def test_what_is_worse_beyond_two_standard_deviations_is_called_worse(means, worse):
    found = judged({"lora": LORA, "uniform": UNIFORM, "mola": means})["mola"]
    assert found["worse"] == worse
    said = f"mola: worse than {' and '.join(worse)} by more than two standard deviations, no sign that routing helps: "
    assert found["text"].startswith(said) is bool(worse)


def test_the_oracle_can_be_worse_too():
    found = judged({"lora": LORA, "oracle": [0.40, 0.42, 0.44]})["oracle"]
    assert (found["holds"], found["worse"]) == (False, ["lora"])
    assert "no sign that knowing the task helps: −10.0 ± 0.0 points against lora (3 seeds)" in found["text"]


def test_two_standard_deviations_is_the_line():
    """Differences 1, 2, 3 have mean 2 and standard deviation 1: level with the line, not above it."""
    base = {"lora": [0.0] * 3, "uniform": [0.0] * 3}
    assert judged({**base, "mola": [0.25, 0.5, 0.75]})["mola"]["holds"] is False
    assert judged({**base, "mola": [0.375, 0.5, 0.75]})["mola"]["holds"] is True


def test_the_spread_that_seeds_share_does_not_count():
    base = {"lora": [0.1, 0.5, 0.9], "uniform": [0.1, 0.5, 0.9]}
    assert judged({**base, "mola": [0.11, 0.51, 0.91]})["mola"]["holds"] is True


def test_above_the_baseline_alone_is_not_routing():
    found = judged({"lora": LORA, "uniform": [0.60, 0.62, 0.64], "mola": [0.60, 0.62, 0.64]})["mola"]
    assert found["holds"] is False
    assert "+10.0 ± 0.0 points against lora (3 seeds) and +0.0 ± 0.0 points against uniform" in found["text"]


def test_what_cannot_be_decided_is_said():
    two = judged({"lora": LORA, "uniform": UNIFORM, "mola": [0.9, 0.9]})["mola"]
    assert two["holds"] is None
    assert two["text"] == "mola: not decided whether routing helps: 2 seeds in common with lora, 3 are needed"
    none = judged({"lora": LORA, "mola": [0.9, 0.9, 0.9]})["mola"]
    assert none["holds"] is None
    assert "no arm with a gate that learns nothing on the same modules" in none["text"]


def test_the_oracle_is_compared_with_the_baseline_and_its_parameters_are_named():
    means = {"lora": LORA, "oracle": [0.60, 0.62, 0.64], "bound": [0.60, 0.62, 0.64]}
    methods = {"lora": "lora", "oracle": "oracle", "bound": "oracle"}
    found = judged(means, methods, {"lora": 100, "oracle": 100, "bound": 400})
    assert found["oracle"]["holds"] is True
    assert found["oracle"]["claim"] == "knowing the task helps"
    assert found["bound"]["claim"] == "knowing the task helps, given 4.0 times the parameters"


def test_a_gate_by_task_id_is_said_to_be_told_it():
    found = judged({"lora": LORA, "uniform": UNIFORM, "moelora": [0.60, 0.62, 0.64], "mola": [0.60, 0.62, 0.64]})
    assert found["moelora"]["claim"] == "routing by the task id, which plain LoRA is not told, helps"
    assert found["mola"]["claim"] == "routing helps"


def test_what_one_row_makes_is_no_difference(make):
    arms = {"lora": [1, 0], "uniform": [1, 0], "mola": [1, 1]}
    cells = [make(name, seed, {"a": rows * 2}) for name, rows in arms.items() for seed in range(3)]
    found = {v["arm"]: v for v in whole(cells)["verdicts"]}["mola"]
    assert found["holds"] is False, "two rows of four in each seed are not more than two rows"
    cells = [make(f"{name}s", seed, {"a": rows * 3}, method=name) for name, rows in arms.items() for seed in range(3)]
    assert {v["arm"]: v for v in whole(cells, "loras")["verdicts"]}["molas"]["holds"] is True


def test_an_arm_is_compared_with_those_that_adapt_the_same_modules():
    means = {"lora": LORA, "uniform": UNIFORM, "mola-all": [0.9] * 3, "lora-all": [0.8, 0.8, 0.81]}
    methods, modules = {"mola-all": "mola", "lora-all": "lora", "uniform-all": "uniform"}, {}
    for name in ("mola-all", "lora-all", "uniform-all"):
        modules[name] = "q_proj x 2, up_proj x 2"
    found = judged(means, methods, modules=modules)["mola-all"]
    assert found["holds"] is None
    assert found["text"].endswith("there is no arm with a gate that learns nothing on the same modules")
    found = judged({**means, "uniform-all": [0.95] * 3}, methods, modules=modules)["mola-all"]
    assert (found["holds"], found["worse"]) == (False, ["uniform-all"])
    assert "points against lora-all (3 seeds)" in found["text"]


def test_an_arm_must_be_above_every_plain_lora_on_its_modules():
    means = {"lora": LORA, "wide": [0.7, 0.7, 0.71], "uniform": UNIFORM, "mola": [0.60, 0.62, 0.64]}
    found = judged(means, {"wide": "lora"})["mola"]
    assert (found["holds"], found["worse"]) == (False, ["wide"])
    assert "−8.3 ± 1.5 points against wide, the highest of 2 (3 seeds) and +10.0" in found["text"]
    assert judged({**means, "wide": LORA}, {"wide": "lora"})["mola"]["holds"] is True


def test_a_baseline_that_is_no_plain_lora_takes_nothing_from_the_rule():
    means = {"lora": [0.9] * 3, "uniform": UNIFORM, "mola": [0.6, 0.62, 0.64]}
    assert judged(means, baseline="uniform")["mola"]["worse"] == ["lora"]
    without = judged({k: v for k, v in means.items() if k != "lora"}, baseline="uniform")["mola"]
    assert without["holds"] is None
    assert "no arm with plain LoRA on the same modules" in without["text"]


@pytest.mark.parametrize(
    ("routers", "kind"),
    [
        ("mola", "learned"),
        ("uniform", "fixed"),
        ("random", "fixed"),
        ("moelora", "told"),
        (["uniform", "mola"], "learned"),
    ],
)
def test_a_recombination_is_of_its_routers_kind(routers, kind):
    config = METHODS["custom"](router_of=routers, num_tasks=3, losses_of=[], gate_of="mola")
    assert verdicts.kind_of("custom", config) == kind


@pytest.mark.parametrize("method", sorted([*PLAIN, *FROM_SCRATCH]))
def test_every_method_is_of_a_kind(method):
    expected = KINDS.get(method, "learned")
    assert verdicts.kind_of(method, methods()[method]()) == expected


def test_controls_and_plain_lora_get_no_verdict():
    means = dict.fromkeys(("lora", "dora", "rslora", "uniform", "random", "mola", "hotmoe"), LORA)
    assert set(judged(means)) == {"mola", "hotmoe"}
