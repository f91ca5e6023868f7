"""The command line: `moesaic <verb> … key=value …`. Help answers without importing torch."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby

from moesaic.cli.verbs import Verb, find, verbs_with
from moesaic.errors import ConfigError, UnknownSetting
from moesaic.runs.process import exit_code, termination_interrupts

_EXAMPLES = """settings are given as key=value, and `moesaic VERB --help` tells a verb's; examples:
  moesaic demo                                                   both acts in minutes, no download
  moesaic compose adapters=a/,b/ method=retrieval data=tasks/    one model of LoRA adapters that are trained already
  moesaic inspect composed prompt='SELECT name FROM'             which of them answers, and why
  moesaic methods mola                                           a method's paper, equations, recipes and settings
  moesaic train hotmoe model=minilm data=tasks/ steps=800        a packaged recipe, settings on top
  moesaic train lora match=hotmoe model=minilm data=tasks/       plain LoRA with as many trainable parameters
  moesaic train my.yaml adapter.num_experts=16 --dry-run         your own recipe, printed, not run
  moesaic eval runs/hotmoe-minilm-s0 runs/lora-minilm-s0         scores side by side, the untrained base beside them
  moesaic compare methods=lora,mola,hotmoe data=tasks/           equal parameters, several seeds, controls, a report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if cells of a comparison are not done, 2 for a mistake that can be
    mended, 130 when interrupted."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # before there was anything to stop
        print("moesaic: interrupted", file=sys.stderr)
        return 130


def _main(given: list[str]) -> int:
    verbs = find()
    at = next((i for i, text in enumerate(given) if not text.startswith("-")), None)
    if at is None:
        return _without_verb(verbs, given)
    name = given.pop(at)
    if name not in verbs:
        near = get_close_matches(name, verbs, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        print(f"moesaic: no verb '{name}'; {hint}known: {', '.join(verbs)}", file=sys.stderr)
        return 2
    parser = verbs[name].parser(_common(), [text for text in given if not text.startswith("-")])
    args, rest = parser.parse_known_args(given, argparse.Namespace(json=False, verbose=False))
    if rest:  # argparse gives up on arguments that follow an option: `… lr=1e-3 --dry-run steps=9`
        if not verbs[name].takes or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.settings += rest
    return exit_code(lambda: _run(verbs[name], args), verbose=args.verbose)


def _run(verb: Verb, args: argparse.Namespace) -> int | None:
    try:
        with termination_interrupts():
            return verb.call(args)
    except UnknownSetting as error:
        others = [f"`moesaic {name}`" for name in verbs_with(error.key) if name != verb.name]
        if not others:
            raise
        raise ConfigError(f"{error}; {error.key} is a setting of {' and '.join(others)}") from None


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print JSON for machines")
    common.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    return common


def _without_verb(verbs: dict[str, Verb], given: list[str]) -> int:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="moesaic",
        usage="moesaic VERB … [key=value …] [--json] [-v]",
        description="Turn what you have into a routed mixture of experts, and see what the router did.",
        epilog=f"{_overview(verbs)}\n\n{_EXAMPLES}",
        parents=[_common()],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moesaic {version('moesaic')}")
    parser.parse_args(given)
    parser.print_help()
    return 0


def _overview(verbs: dict[str, Verb]) -> str:
    """The verbs with a line each, under the headings of their groups."""
    lines: list[str] = []
    for group, members in groupby(verbs.values(), key=lambda verb: verb.group):
        lines += [f"{group}:", *(f"  {verb.name:<10} {verb.summary}" for verb in members)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
