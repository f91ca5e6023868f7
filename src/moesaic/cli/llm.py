"""`moesaic llm fit | frontier | route | serve | bench`: whole language models as experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.llms.running import SETTINGS, LlmBench, LlmFit, LlmFrontier, LlmRoute, check_given
from moesaic.runs.recipe import parse_settings

if TYPE_CHECKING:
    from moesaic.llms.catalog import Catalog
    from moesaic.llms.coe.composition import Decision

ACTIONS = (*SETTINGS, "serve")

_ABOUT = """A prompt has a category, and each category an expert: a model of the catalog, so chosen that all experts
together fit a budget. The gateway sends prompts to them, as one OpenAI-compatible endpoint.

  moesaic llm fit data=scores.jsonl catalog=models.yaml resident=24 out=coe   categories, their router, the mapping
  moesaic llm frontier data=scores.jsonl catalog=models.yaml out=frontier.svg what a larger budget would buy
  moesaic llm route coe prompt='Prove that 2 is prime'                        who would answer, and why
  moesaic llm bench coe data=others.jsonl catalog=models.yaml                 how well it would have done (replayed)
  moesaic llm serve gateway.yaml                                              the endpoint; docs/coe.md has the file"""


@verb(
    "llm",
    "whole language models as experts: fit, frontier, route, serve, bench",
    group="language models",
    place=96,
    settings=[Section(of, f"settings of {name} (key=value):", actions=(name,)) for name, of in SETTINGS.items()],
    operands={"action": "fit, frontier, route, serve or bench"},
    takes="key=value | FOLDER | FILE",
    about=lambda: _ABOUT,
)
def run(action: str, arguments: list[str], *, as_json: bool = False) -> None:
    """Raises MoesaicError of the kind that fits."""
    if action not in ACTIONS:
        raise ConfigError(f"llm {action}: no such action; {suggest(action, ACTIONS)}")
    places = [text for text in arguments if "=" not in text]
    wanted = {"route": "a composition's folder", "bench": "a composition's folder", "serve": "a gateway's YAML file"}
    if len(places) != (action in wanted):
        raise ConfigError(f"llm {action} takes {wanted.get(action, 'settings alone')}: moesaic llm {action} --help")
    given = [text for text in arguments if "=" in text]
    if action == "serve":
        if given:
            raise ConfigError(f"{given[0]}: settings of a gateway stand in its file")
        _serve(places[0])
        return
    settings: Any = parse_settings(SETTINGS[action], given)
    actions: dict[str, Any] = {"fit": _fit, "frontier": _frontier, "route": _route, "bench": _bench}
    actions[action](settings, *places, as_json=as_json)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def catalog_of(path: str) -> Catalog:
    """A catalog of ours, or LLMRouter's descriptors."""
    from moesaic.llms.catalog import Catalog
    from moesaic.llms.tables import llmrouter_catalog

    place = path_of(path)
    return llmrouter_catalog(place) if place.is_dir() or place.suffix == ".json" else Catalog.read(place)


def _budget(wanted: Any) -> Any:
    from moesaic.llms.coe.problem import Budget

    return Budget(wanted.resident, wanted.active, wanted.cost, wanted.experts, wanted.pins)


def _fit(wanted: LlmFit, *, as_json: bool) -> None:
    from dataclasses import fields

    from moesaic.llms.coe.fit import fit
    from moesaic.llms.coe.fitting import Fitting
    from moesaic.llms.coe.observed import Observed
    from moesaic.report.coe import fitted
    from moesaic.report.text import table

    check_given(wanted, "data", "catalog", "out")
    catalog, data = catalog_of(wanted.catalog), Observed.read(wanted.data, wanted.format or None)
    how = Fitting(**{f.name: getattr(wanted, f.name) for f in fields(Fitting)})
    made = fit(data, catalog, _budget(wanted), how, out=wanted.out, overwrite=wanted.overwrite, progress=_tell)
    if as_json:
        print_json({"expert": dict(made.solution.expert), **made.about})
    else:
        show(*map(table, fitted(made)))
        print(f"written: {path_of(wanted.out)}")


def _frontier(wanted: LlmFrontier, *, as_json: bool) -> None:
    from moesaic.llms.coe import frontier
    from moesaic.llms.coe.problem import Problem
    from moesaic.llms.tables import read_table
    from moesaic.report.text import table
    from moesaic.runs.folder import check_writable, write_text

    check_given(wanted, "data", "catalog")
    out = path_of(wanted.out) if wanted.out else None
    if out is not None:
        if out.suffix != ".svg":
            raise ConfigError(f"out={out} must end in .svg")
        check_writable(out, f"out={out}")
    recorded = read_table(wanted.data, wanted.format or None)
    if not any(recorded.categories):
        raise ConfigError(f"{wanted.data} has no categories: `moesaic llm fit` finds some, a mapping at a time")
    problem = Problem.of_table(recorded, catalog_of(wanted.catalog))
    points = frontier.frontier(problem, wanted.over, _budget(wanted), z=wanted.z, step=wanted.step)
    if as_json:
        print_json(frontier.rows(points, wanted.over))
    else:
        show(table(frontier.grid(points, wanted.over)))
    if out is not None:
        curves = {"expected": [(limit, solution.score) for limit, solution in points]}
        write_text(out, frontier.svg(curves, wanted.over))
        _tell(f"picture: {out}")


def _route(wanted: LlmRoute, folder: str, *, as_json: bool) -> None:
    from moesaic.llms.coe.composition import Composition
    from moesaic.report.coe import decided
    from moesaic.report.text import table

    if bool(wanted.prompt) == bool(wanted.file):
        raise ConfigError("give prompt=… or file=… (a prompt a line), one of them")
    prompts = [sys.stdin.read() if wanted.prompt == "-" else wanted.prompt] if wanted.prompt else _lines(wanted.file)
    if not all(prompt.strip() for prompt in prompts) or not prompts:
        raise ConfigError("a prompt is empty")
    made = Composition.load(folder)
    found = made.decide_many(prompts)
    if as_json:
        print_json([_plain(prompt, decision) for prompt, decision in zip(prompts, found, strict=True)])
    else:
        show(*map(table, decided(prompts, found)))


def _lines(file: str) -> list[str]:
    path = path_of(file)
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"file={path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        ) from None


def _plain(prompt: str, decision: Decision) -> dict[str, Any]:
    from dataclasses import asdict

    return {"prompt": prompt, **asdict(decision)}


def _bench(wanted: LlmBench, folder: str, *, as_json: bool) -> None:
    from moesaic.llms.coe.composition import Composition
    from moesaic.llms.coe.replayed import replayed, timed
    from moesaic.llms.tables import read_table
    from moesaic.report.coe import benched
    from moesaic.report.text import table

    check_given(wanted, "data", "catalog")
    recorded, catalog = read_table(wanted.data, wanted.format or None), catalog_of(wanted.catalog)
    made = Composition.load(folder)
    found = replayed(made, recorded, catalog, seed=wanted.seed)
    found["milliseconds"] = timed(made, recorded.prompts, wanted.rounds)
    if as_json:
        print_json(found)
    else:
        show(*map(table, benched(found)))


def _serve(file: str) -> None:
    from moesaic.llms.gateway.serve import serve

    serve(Path(file), say=lambda url: _tell(f"{url}: Ctrl-C stops"))
