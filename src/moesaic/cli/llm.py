"""`moesaic llm fit | frontier | route | serve | bench | r1`: whole language models as experts."""

from __future__ import annotations

import sys
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import llm_r1
from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.llms.router_r1.settings import SETTINGS as R1
from moesaic.llms.running import SETTINGS, LlmBench, LlmFit, LlmFrontier, LlmRoute, LlmServe, check_given
from moesaic.runs.process import standard_input
from moesaic.runs.recipe import parse_settings
from moesaic.runs.settings import check_within

if TYPE_CHECKING:
    from moesaic.llms.catalog import Catalog
    from moesaic.llms.coe.composition import Decision

ACTIONS = (*SETTINGS, "serve", "r1")

_ABOUT = """A prompt has a category, and each category an expert: a model of the catalog, so chosen that all experts
together fit a budget. The gateway sends prompts to them, as one OpenAI-compatible endpoint.

  moesaic llm fit data=scores.jsonl catalog=models.yaml resident=24 out=coe   categories, their router, the mapping
  moesaic llm frontier data=scores.jsonl catalog=models.yaml out=frontier.svg what a larger budget would buy
  moesaic llm route coe prompt='Prove that 2 is prime'                        who would answer, and why
  moesaic llm bench coe data=others.jsonl catalog=models.yaml                 how well it would have done (replayed)
  moesaic llm serve gateway.yaml                                              the endpoint; docs/coe.md has the file

"""


@verb(
    "llm",
    "whole language models as experts: fit, frontier, route, serve, bench, r1",
    group="language models",
    place=96,
    settings=[
        *[Section(of, f"settings of {name} (key=value):", actions=(name,)) for name, of in SETTINGS.items()],
        Section(LlmServe, "serve has no settings: all that a gateway is told stands in its file", actions=("serve",)),
        *[Section(of, f"settings of r1 {name} (key=value):", actions=(f"r1 {name}",)) for name, of in R1.items()],
    ],
    operands={"action": "fit, frontier, route, serve, bench or r1"},
    takes="key=value | FOLDER | FILE",
    about=lambda: _ABOUT + llm_r1.ABOUT,
)
def run(action: str, arguments: list[str], *, as_json: bool = False) -> None:
    """Raises MoesaicError of the kind that fits."""
    if action not in ACTIONS:
        raise ConfigError(f"llm {action}: no such action; {suggest(action, ACTIONS)}")
    if action == "r1":
        llm_r1.run(arguments, as_json=as_json)
        return
    places = [text for text in arguments if "=" not in text]
    wanted = {"route": "one folder, a composition's", "bench": "one folder, a composition's",
              "serve": "one file, a gateway's"}  # fmt: skip
    if len(places) != (action in wanted):
        found = f"{', '.join(places)} (values with spaces want quotes)" if places else "none"
        raise ConfigError(f"llm {action} takes {wanted.get(action, 'key=value settings alone')}, not {found}")
    given = [text for text in arguments if "=" in text]
    if action == "serve":
        if given or as_json:
            raise ConfigError(f"{(given or ['--json'])[0]}: settings of a gateway stand in its file")
        _serve(places[0])
        return
    settings: Any = parse_settings(SETTINGS[action], given)
    actions: dict[str, Any] = {"fit": _fit, "frontier": _frontier, "route": _route, "bench": _bench}
    actions[action](settings, *places, as_json=as_json)


def _tell(line: str) -> None:
    from moesaic.report.text import printable

    print(printable(line), file=sys.stderr)


def catalog_of(path: str) -> Catalog:
    """A catalog of ours, or LLMRouter's descriptors."""
    from moesaic.llms.catalog import Catalog
    from moesaic.llms.tables import llmrouter_catalog

    place = path_of(path)
    if not place.exists():
        raise ConfigError(f"catalog={path}: no such file")
    return llmrouter_catalog(place) if place.is_dir() or place.suffix == ".json" else Catalog.read(place)


def _budget(wanted: Any) -> Any:
    from moesaic.llms.coe.problem import Budget

    resident, active, cost = (
        None if limit == inf else limit for limit in (wanted.resident, wanted.active, wanted.cost)
    )
    return Budget(resident, active, cost, wanted.experts, wanted.pins)


def _fit(wanted: LlmFit, *, as_json: bool) -> None:
    from dataclasses import asdict, fields

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
        print_json({"out": str(path_of(wanted.out)), "solution": asdict(made.solution), **made.about})
    else:
        show(*map(table, fitted(made)))
        print(f"written: {path_of(wanted.out)}")


def _frontier(wanted: LlmFrontier, *, as_json: bool) -> None:
    from moesaic.llms.coe import frontier
    from moesaic.llms.coe.observed import Observed
    from moesaic.report.text import table
    from moesaic.runs.folder import check_writable, write_text

    check_given(wanted, "data", "catalog")
    out = path_of(wanted.out) if wanted.out else None
    if out is not None:
        if out.suffix != ".svg":
            raise ConfigError(f"out={out} must end in .svg")
        if out.is_dir():
            raise ConfigError(f"out={out} is a folder; name a file")
        check_writable(out, f"out={out}")
    catalog = catalog_of(wanted.catalog)
    problem = Observed.read(wanted.data, wanted.format or None).by_category(catalog)
    points = frontier.frontier(problem, wanted.over, _budget(wanted), z=wanted.z, step=wanted.step)
    if as_json:
        print_json(frontier.rows(points, wanted.over))
    else:
        show(table(frontier.grid(points, wanted.over), legend=True))
    if out is not None:
        curves = {"expected": [(limit, solution.score) for limit, solution in points]}
        write_text(out, frontier.svg(curves, wanted.over))
        _tell(f"written: {out}")


def _route(wanted: LlmRoute, folder: str, *, as_json: bool) -> None:
    from moesaic.data.jsonl import encodable
    from moesaic.llms.coe.composition import Composition
    from moesaic.report.coe import decided
    from moesaic.report.text import table

    if bool(wanted.prompt) == bool(wanted.file):
        raise ConfigError("give prompt=… or file=… (a prompt a line), one of them")
    if wanted.file:
        prompts = _lines(wanted.file)
    else:
        text = standard_input() if wanted.prompt == "-" else wanted.prompt or ""
        prompts = [encodable(text, "prompt", "llm route")]
    if not any(prompt.strip() for prompt in prompts):
        raise ConfigError(f"{f'file={wanted.file}' if wanted.file else 'prompt'} is empty: there is nothing to answer")
    found = Composition.load(folder).decide_many(prompts)
    if as_json:
        print_json([_plain(prompt, decision) for prompt, decision in zip(prompts, found, strict=True)])
    else:
        show(*map(table, decided(prompts, found)))


def _lines(file: str) -> list[str]:
    path = path_of(file)
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
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
    check_within(wanted, {"rounds": (1, 1e6), "seed": (0, 2**32 - 1)})
    made = Composition.load(folder)
    catalog, recorded = catalog_of(wanted.catalog), read_table(wanted.data, wanted.format or None)
    if path_of(str(made.about.get("source") or "")).absolute() == path_of(wanted.data).absolute():
        _tell(f"{folder} was fitted to {wanted.data}: on other prompts it would do worse")
    found = replayed(made, recorded, catalog, seed=wanted.seed)
    found["milliseconds"] = timed(made, recorded.prompts, wanted.rounds)
    if as_json:
        print_json(found)
    else:
        show(*(table(grid, legend=True) for grid in benched(found)))


def _serve(file: str) -> None:
    from moesaic.llms.gateway.serve import serve

    try:
        serve(Path(file), say=lambda url: _tell(f"{url}: Ctrl-C stops"))
    except KeyboardInterrupt:  # how a gateway ends
        _tell("stopped")
