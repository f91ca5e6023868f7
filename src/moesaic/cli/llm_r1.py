"""`moesaic llm r1 train | eval | chat | export`: a language model that learns whom to ask, over several rounds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.show import print_json, show
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.llms.router_r1.settings import SETTINGS, R1Chat, R1Eval, R1Export, R1Train, check_pool
from moesaic.llms.running import check_given
from moesaic.runs.process import standard_input
from moesaic.runs.recipe import parse_settings

if TYPE_CHECKING:
    from moesaic.llms.router_r1.engine import Rollout
    from moesaic.llms.router_r1.transcript import Piece

ABOUT = """A policy thinks, asks models, reads what they say and answers; it learns by reward whom to ask.

  moesaic llm r1 train data=train.jsonl catalog=models.yaml model=Qwen/Qwen2.5-3B-Instruct alpha=0.6 out=runs/r1
  moesaic llm r1 eval runs/r1 data=test.jsonl catalog=models.yaml every=true     beside each model by itself
  moesaic llm r1 chat runs/r1 catalog=models.yaml prompt='Who painted The Kiss?'
  moesaic llm r1 export data=train.jsonl catalog=models.yaml out=verl            the published recipe, for verl"""


def run(arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Raises MoesaicError of the kind that fits."""
    action, *rest = [*arguments, ""]
    if not action:
        raise ConfigError(f"llm r1 wants an action: {', '.join(SETTINGS)}")
    if action not in SETTINGS:
        raise ConfigError(f"llm r1 {action}: no such action; {suggest(action, SETTINGS)}")
    places, given = [text for text in rest if text and "=" not in text], [text for text in rest if "=" in text]
    if len(places) != (action in ("eval", "chat")):
        wanted = "one folder, a policy's" if action in ("eval", "chat") else "key=value settings alone"
        found = f"{', '.join(places)} (values with spaces want quotes)" if places else "none"
        raise ConfigError(f"llm r1 {action} takes {wanted}, not {found}")
    actions: dict[str, Any] = {"train": _train, "eval": _eval, "chat": _chat, "export": _export}
    actions[action](parse_settings(SETTINGS[action], given), *places, as_json=as_json)


def _tell(line: str) -> None:
    from moesaic.report.text import printable

    print(printable(line), file=sys.stderr)


def _train(wanted: R1Train, *, as_json: bool) -> None:
    from moesaic.llms.router_r1.running import train
    from moesaic.report.router_r1 import tried
    from moesaic.report.text import table

    results = train(wanted, say=_tell)
    if as_json:
        print_json(results)
        return
    if results["tried"]:
        show(table(tried(results["tried"]), legend=True))
    print(f"{path_of(wanted.out)}: curves in report.html, the policy in policy/")


def _eval(wanted: R1Eval, folder: str, *, as_json: bool) -> None:
    from moesaic.llms.router_r1.evaluating import evaluate
    from moesaic.report.router_r1 import asked, compared
    from moesaic.report.text import table

    check_given(wanted, "data", "catalog")
    check_pool(wanted)
    found = evaluate(wanted, folder, say=_tell)
    if as_json:
        print_json(found)
    else:
        show(table(compared(found["rows"], found["questions"]), legend=True), table(asked(found["rows"])))


def _chat(wanted: R1Chat, folder: str, *, as_json: bool) -> None:
    from moesaic.llms.catalog import Catalog
    from moesaic.llms.router_r1.engine import Question, roll
    from moesaic.llms.router_r1.evaluating import adjusted, policy_of
    from moesaic.llms.router_r1.questions import check_askable
    from moesaic.llms.router_r1.running import pool_of

    check_given(wanted, "catalog")
    check_pool(wanted)
    catalog = Catalog.read(wanted.catalog)
    check_askable(catalog)
    policy, asking = adjusted(*policy_of(folder), wanted.turns, wanted.max_new_tokens)
    pool = pool_of(wanted, asking.max_tokens, bare=asking.bare)

    def answer(text: str) -> None:
        question = Question(text, catalog, alpha=wanted.alpha)

        def watch(which: int, piece: Piece) -> None:
            if not as_json:
                _tell((policy.dialect.shown(piece.text) if piece.reply else piece.text).strip())

        (rollout,) = roll(
            policy, pool, [question], asking.limits(wanted.budget), say=asking.say, watch=watch,
            dialect=policy.dialect,
        )  # fmt: skip
        _answered(rollout, as_json=as_json)

    try:
        if wanted.prompt is not None:
            answer(standard_input() if wanted.prompt == "-" else wanted.prompt)
        elif sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError("prompt is missing: prompt=… (a question; - reads it from standard input)")
        else:
            _tell("a question a line; an empty line ends")
            while text := input("> ").strip():
                answer(text)
    except EOFError:
        pass
    finally:
        pool.close()


def _answered(rollout: Rollout, *, as_json: bool) -> None:
    if as_json:
        print_json(rollout.trace())
        return
    cost = f"{len(rollout.calls)} calls, ${rollout.cost / 1e6:.6f}"
    for call in rollout.calls:
        if call.failure:
            _tell(f"{call.name}: {call.failure}")
    fault = f"; the format is broken: {rollout.fault()}" if rollout.fault() else ""
    from moesaic.report.text import printable

    _tell(cost + fault)
    print(printable(rollout.answer))


def _export(wanted: R1Export, *, as_json: bool) -> None:
    from moesaic.llms.router_r1.verl import export

    check_given(wanted, "data", "catalog", "out")
    files = export(wanted)
    if as_json:
        print_json({"out": str(path_of(wanted.out)), "files": [Path(file).name for file in files]})
    else:
        print("written: " + ", ".join(map(str, files)))
        print("The configuration has not been run here: it states the published recipe for verl's trainer.")
