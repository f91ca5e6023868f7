"""`moesaic stream run | compare | report`: learners on data streams, test then train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.trees.comparison import StreamComparison, load_comparison
from moesaic.trees.running import StreamRun, load_run

ACTIONS = ("run", "compare", "report")

_ABOUT = """Each row is predicted before it is learned. Streams: generators (led_a, led_g, sea_a, sea_g, rbf_m, rbf_f,
agrawal, hyperplane, stagger, sea_recurring …), data sets (electricity, covtype, airlines, elec2, insects_… ), files.
Learners: driftmoe, driftmoe-paper, driftmoe-code, driftmoe-task…, nochange, majority, river-ht, river-arf, river-srp,
river:MODULE.CLASS, capymoa-arf, capymoa-srp, capymoa-dems …

  moesaic stream run led_a length=20000                         figures, drifts and who did what: report.html
  moesaic stream run sensors.csv.gz source.target=state         a file (target: the last column where left out;
                                                                source.drop=time,id leaves columns out,
                                                                source.on_bad_rows=skip rows that do not fit)
  moesaic stream compare streams=led_a,sea_a learners=driftmoe,river-arf seeds=0,1,2
  moesaic stream report runs/led_a-driftmoe-s0 runs/led_a-river-arf-s0 out=both.html"""


@verb(
    "stream",
    "incremental trees as experts on a data stream: run, compare, report",
    group="streams",
    place=95,
    settings=[
        Section(StreamRun, "settings of run (key=value):", actions=("run",)),
        Section(StreamComparison, "settings of compare (key=value):", actions=("compare",)),
    ],
    operands={"action": "run, compare or report"},
    takes="key=value | FOLDER",
    about=lambda: _ABOUT,
)
def run(action: str, arguments: list[str], *, as_json: bool = False) -> int | None:
    """Raises MoesaicError of the kind that fits; nothing that is there is lost."""
    if action not in ACTIONS:
        raise ConfigError(f"stream {action}: no such action; {suggest(action, ACTIONS)}")
    return {"run": _run, "compare": _compare, "report": _report}[action](arguments, as_json)


def _run(arguments: list[str], as_json: bool) -> int | None:
    wanted = load_run(arguments)
    from moesaic.trees.running import run as ran

    results = ran(wanted)
    if as_json:
        print_json(results)
        return None
    named = {"accuracy": "accuracy", "kappa": "kappa", "kappa M": "kappa_m", "kappa T": "kappa_t"}
    figures = ", ".join(f"{name} {_percent(results[key])}" for name, key in named.items())
    speed = f"{results['rows_per_second']:,.0f} rows a CPU second"
    print(f"{wanted.folder()}: {results['rows']:,} rows, {figures}; {speed}")
    if results["labelled"] is not None:
        print(f"labels: column {results['labelled']}, {len(results['classes']):,} classes")
    if results["unlabelled"]:
        print(f"{results['unlabelled']:,} rows had no label")
    if results["skipped"]:
        print(f"{results['skipped']:,} rows were malformed, and left out; the first: {results['skipped_first']}")
    print(f"over time, drifts, and who did what: {wanted.folder() / 'report.html'}")
    return None


def _compare(arguments: list[str], as_json: bool) -> int | None:
    wanted = load_comparison(arguments)
    from moesaic.report.streams_compared import comparison_grids
    from moesaic.trees.comparing import compare

    summary = compare(wanted)
    if as_json:
        print_json(summary)
    else:
        from moesaic.report.text import table

        show(*(table(grid) for grid in comparison_grids(summary)))
        print(f"over time: {path_of(wanted.out) / 'report.html'}")
    return int(any("failed" in cell for of in summary["table"].values() for cell in of.values()))


def _report(arguments: list[str], as_json: bool) -> int | None:
    folders, settings = [a for a in arguments if "=" not in a], dict(a.split("=", 1) for a in arguments if "=" in a)
    if not folders or settings.keys() - {"out"}:
        raise ConfigError("stream report takes folders of finished runs and out=FILE.html")
    from moesaic.report.page import is_page
    from moesaic.report.streams import page
    from moesaic.runs.folder import check_writable, write_text
    from moesaic.trees.running import finished

    results = [finished(path_of(folder)) for folder in folders]
    file = path_of(settings.get("out") or "report.html")
    if file.suffix != ".html":
        raise ConfigError(f"out={file} must end in .html")
    check_writable(file, f"out={file}")
    if file.exists() and not is_page(file, "moesaic stream"):
        raise ConfigError(f"out={file} is already there, and is no page of `moesaic stream`: name another file")
    write_text(file, page(results))
    if as_json:
        print_json({"file": str(file), "runs": [_brief(r) for r in results]})
    else:
        print(f"written: {file}")
    return None


def _brief(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("stream", "learner", "seed", "rows", "accuracy", "kappa_m", "kappa_t")}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
