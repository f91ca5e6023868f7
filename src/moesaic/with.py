"""Run another program after moesaic is imported, so that it loads a mixture wherever PEFT loads an adapter.

PROGRAM is a console script by name (lm_eval, trl), -m MODULE, or a .py file; what follows is its own. lm-eval is
also told where prompts end, which mixtures that route by the prompt have to know.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import moesaic  # noqa: F401  registers the methods as soon as PEFT is there
from moesaic.errors import ConfigError, MoesaicError, path_of, suggest

USAGE = "usage: python -m moesaic.with PROGRAM [ARGUMENT …]"


def main() -> Any:
    """Run what the command line names; what its process is to end with."""
    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return 0 if given else 2
    try:
        run, rest = found(given)
    except MoesaicError as error:
        print(f"moesaic: {error}", file=sys.stderr)
        return 2
    sys.argv = rest
    return run()


def found(given: Sequence[str]) -> tuple[Callable[[], Any], list[str]]:
    """A program, and what its `sys.argv` is to be. Raises ConfigError where there is no such program."""
    name, *rest = given
    if name == "-m":
        if not rest:
            raise ConfigError(f"-m names no module; {USAGE}")
        if not _is_module(rest[0]):
            raise ConfigError(f"no module {rest[0]} is installed")
        _prepare(rest[0])
        return partial(_run, runpy.run_module, rest[0], alter_sys=True), rest
    if name.endswith(".py"):
        if not path_of(name).is_file():
            raise ConfigError(f"there is no file {name}")
        sys.path.insert(0, str(path_of(name).resolve().parent))
        return partial(_run, runpy.run_path, str(path_of(name))), [name, *rest]
    known = {entry.name: entry for entry in entry_points(group="console_scripts")}
    if name not in known:
        raise ConfigError(f"no console script {name} is installed; {suggest(name, known)}")
    _prepare(known[name].module)
    return known[name].load(), [name, *rest]


def _prepare(module: str) -> None:
    """What a program has to be told that cannot know of moesaic."""
    if module.partition(".")[0] == "lm_eval":
        from moesaic.evaluation.harness import tell_prompts

        tell_prompts()


def _run(how: Callable[..., Any], name: str, **more: Any) -> None:
    """As `python` runs it; what it leaves is nobody's."""
    how(name, run_name="__main__", **more)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
