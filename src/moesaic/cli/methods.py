"""What `moesaic methods` tells, all of it read from the methods' own configs, docstrings and recipes."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import MISSING, Field, fields
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import verb
from moesaic.errors import ConfigError, suggest
from moesaic.runs.method import PLAIN, adapter_settings, methods
from moesaic.runs.recipe import PACKAGED, load_recipe, packaged, packaged_pretrainings
from moesaic.runs.settings import read_yaml

if TYPE_CHECKING:
    from rich.console import RenderableType

_CONVERT = "convert/"
_USE = """in a recipe or on the command line: adapter.{setting}=…
in Python: {config}({setting}=…)"""
_USE_CONVERTED = """on the command line: moesaic {method} … experts.{setting}=…
in Python: help({config})"""


@verb(
    "methods",
    "list the methods that can be trained, or tell all of one",
    group="mixtures",
    place=20,
    operands={"name?": "a method, or a recipe of one: its paper, equations, recipes and settings"},
    takes="",
)
def run(name: str | None, *, as_json: bool = False) -> None:
    if name:
        about = describe(name)
        print_json(about) if as_json else show(shown(about))
        return
    from moesaic.report.tables import methods_table

    rows = overview()
    print_json(rows) if as_json else show(methods_table(rows))


def overview() -> list[dict[str, Any]]:
    """Every method in a line: {"method", "summary", "paper", "recipe"}, the last None where none comes along."""
    known = packaged()
    mixtures = {name: (plain.summary, plain.paper) for name, plain in PLAIN.items()}
    mixtures |= _declared("method", "lora/methods", "adapters")
    rows = [(name, *mixtures[name], name if name in known else None) for name in sorted(mixtures)]
    rows += [(f"{_CONVERT}{name}", *about, None) for name, about in sorted(_declared("name", "ffn").items())]
    return [
        {"method": name, "summary": summary, "paper": paper, "recipe": recipe} for name, summary, paper, recipe in rows
    ]


def _declared(key: str, *packages: str) -> dict[str, tuple[str, str]]:
    """Summary and paper of methods by name, read out of their source: to import them takes seconds."""
    found: dict[str, tuple[str, str]] = {}
    for package in packages:
        for file in (Path(__file__).parents[1] / package).glob("*.py"):
            for node in ast.parse(file.read_bytes()).body:
                if isinstance(node, ast.ClassDef):
                    said = {
                        part.target.id: str(part.value.value)
                        for part in node.body
                        if isinstance(part, ast.AnnAssign)
                        and isinstance(part.target, ast.Name)
                        and isinstance(part.value, ast.Constant)
                    }
                    if {key, "summary", "paper"} <= said.keys():
                        found[said[key]] = said["summary"], said["paper"]
    return found


def describe(name: str) -> dict[str, Any]:
    """One method: paper, equations, recipes, and every setting with its default, its recipe's value and its meaning.

    `recipe` of a setting is what the recipe of the method's own name sets it to, None where that is silent.


    Raises:
        ConfigError: no such method (naming the nearest).
    """
    from moesaic.lora import MixtureConfig

    known = methods()
    if name not in known and name in packaged():
        name = load_recipe(name).method
    if name.startswith(_CONVERT) or (name not in known and name in ffn_methods()):
        return _converting(_CONVERT + name.removeprefix(_CONVERT))
    if name not in known:
        raise ConfigError(f"no method '{name}'; {suggest(name, [*known, *ffn_methods()])}")
    config, about = known[name], _about(name)
    shared = {f.name for f in fields(MixtureConfig)} - get_annotations(config).keys()
    allowed = adapter_settings(name)
    set_by_recipe = load_recipe(name).adapter if name in packaged() else {}
    settings = [f for f in fields(config) if f.name in allowed]
    return {
        "method": name,
        "summary": about.summary,
        "paper": about.paper,
        "about": None if name in PLAIN else (sys.modules[config.__module__].__doc__ or "").strip(),
        "config": config.__name__ if name in PLAIN else f"moesaic.{config.__name__}",
        "recipes": [r for r in packaged() if read_yaml(PACKAGED / f"{r}.yaml").get("method") == name],
        "settings": [
            {
                "name": f.name,
                "default": _default(name, f),
                "recipe": set_by_recipe.get(f.name),
                "help": _line(f),
                "shared": f.name in shared,
            }
            for f in sorted(settings, key=lambda f: f.name in shared)
        ],
    }


def ffn_methods() -> dict[str, Any]:
    from moesaic.ffn.method import methods as found

    return dict(found())


def _converting(name: str) -> dict[str, Any]:
    """`describe` for a method of feed-forward layers, which `moesaic convert` and pre-training recipes take."""
    found = ffn_methods()
    kind = found.get(name.removeprefix(_CONVERT))
    if kind is None:
        raise ConfigError(f"no method '{name}'; {suggest(name, [_CONVERT + other for other in found])}")
    return {
        "method": name,
        "summary": kind.summary,
        "paper": kind.paper,
        "about": (sys.modules[kind.__module__].__doc__ or "").strip(),
        "config": f"moesaic.ffn.{kind.__name__}",
        "recipes": [r for r in packaged_pretrainings() if read_yaml(PACKAGED / f"{r}.yaml").get("method") == kind.name],
        "settings": [
            {
                "name": f"{within}{f.name}",
                "default": f.default,
                "recipe": None,
                "help": f.metadata["help"],
                "shared": False,
            }
            for within, settings in (("", kind), ("tune.", kind.training))
            for f in (fields(settings) if settings else ())
            if "help" in f.metadata
        ],
    }


def shown(about: dict[str, Any]) -> RenderableType:
    """What `describe` found, for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text.assemble((about["method"], "bold"), f": {about['summary']}")]
    parts.append(Text(f"paper: {about['paper']}\nrecipes: {', '.join(about['recipes']) or 'none'}"))
    if about["about"]:
        parts.append(Text(f"\n{about['about']}\n"))
    for title, shared in (("settings", False), ("settings of every mixture", True)):
        rows = [s for s in about["settings"] if s["shared"] is shared]
        if rows:
            table = Table("setting", "default", "recipe", "meaning", title=title, title_justify="left", box=None)
            for row in rows:
                recipe = "" if row["recipe"] is None else _plain(row["recipe"])
                table.add_row(*map(Text, (row["name"], _plain(row["default"]), recipe, row["help"])))
            parts.append(table)
    first = about["settings"][0]["name"]
    converted = about["method"].startswith(_CONVERT)
    said = (_USE_CONVERTED if converted else _USE).format(
        setting=first, config=about["config"], method=about["method"].replace("/", " ")
    )
    return Group(*parts, Text(f"\n{said}"))


def _about(name: str) -> Any:
    return PLAIN.get(name) or methods()[name]


def _default(method: str, field: Field[Any]) -> Any:
    """As JSON can have it: PEFT's own kinds of LoRA fix some, and nested configs are said by name."""
    if method in PLAIN and field.name in PLAIN[method].settings:
        return PLAIN[method].settings[field.name]
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return value if isinstance(value, (str, int, float, list, dict, type(None))) else type(value).__name__


def _line(field: Field[Any]) -> str:
    """The first sentence of a setting's help: PEFT's run on."""
    text = re.sub(r"<[^>]+>", "", " ".join(str(field.metadata.get("help", "")).split()))
    return re.split(r"(?<=[a-z)`'])\.\s+(?=[A-Z])", text)[0].rstrip(".")


def _plain(value: Any) -> str:
    """A default as it is written in a setting; "-" where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None or value in ([], {}, "") else str(value)
