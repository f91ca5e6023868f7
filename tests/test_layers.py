"""Who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).parent
FLOORS = (
    ("errors",),
    ("routing",),
    ("host",),
    ("data", "report"),
    ("ffn",),
    ("models",),
    ("lora",),
    ("adapters",),
    ("runs",),
    ("training", "trees", "skills"),
    ("evaluation",),
    ("compare", "bench", "serving"),
    ("llms",),
    ("cli",),
)
"""From the ground up: a room imports those on floors below its own."""
NARROWER = {
    "routing": {"errors"},
    "host": {"routing", "errors"},
    "data": {"errors"},
    "report": {"errors"},
    "models": {"data", "ffn", "errors"},
    "lora": {"host", "routing", "errors", "models"},
    "ffn": {"host", "routing", "errors"},
    "adapters": {"lora", "host", "routing", "errors"},
    "trees": {"routing", "runs", "report", "errors"},
    "skills": {"routing", "runs", "report", "errors"},
    "llms": {"routing", "data", "models", "runs", "report", "evaluation", "serving", "errors"},
}
"""Rooms that import less than the floors below them hold."""
ALLOWED = {
    room: NARROWER.get(room, {name for floor in FLOORS[:number] for name in floor}) | {room}
    for number, rooms in enumerate(FLOORS)
    for room in rooms
}
HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "rich", "accelerate", "omegaconf", "matplotlib")


def imported_modules(source: str, package: str) -> set[str]:
    """Full names of all modules a file imports, at any depth and inside functions too.

    `package` is the dotted name of the file's package, against which relative imports are resolved.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "moesaic" else {module}
    return found


def path_name(file: Path) -> str:
    """The dotted name of one of our files; a package's is that of its `__init__.py`."""
    return ".".join(("moesaic", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported_files(file: Path, files: Mapping[str, Path]) -> set[str]:
    """Those of `files`, by name, that a file imports: `from package import module` is the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & files.keys() or {node.module}
    return found & files.keys()


def own_rooms(source: str, package: str) -> set[str]:
    """First component after `moesaic.` of everything a file imports from the project; "" for the package itself."""
    ours = [m for m in imported_modules(source, package) if m.split(".")[0] == "moesaic"]
    return {[*m.split("."), ""][1] for m in ours}


def test_every_room_has_a_floor_and_no_file_lies_loose() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms == ALLOWED.keys() - {"errors"}
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "with.py"}


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {path_name(file): file for file in ROOT.rglob("*.py")}
    imports = {name: imported_files(file, files) - {name} for name, file in files.items()}
    left = dict(imports)
    while True:
        free = [name for name, wanted in left.items() if not wanted & left.keys()]
        if not free:
            break
        for name in free:
            del left[name]
    assert not left, f"in circles, or above one: {sorted(left)}"


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moesaic.b import B\n")
    files = {"moesaic.a": tmp_path / "a.py", "moesaic.b": tmp_path / "b.py"}
    assert imported_files(files["moesaic.a"], files) == {"moesaic.b"}


@pytest.mark.parametrize("room", sorted(ALLOWED.keys() - {"errors"}))
def test_a_room_imports_only_the_floors_below_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no files in {room}"
    for file in files:
        package = ".".join(("moesaic", *file.relative_to(ROOT).parent.parts))
        outside = own_rooms(file.read_text(encoding="utf-8"), package) - ALLOWED[room]
        assert not outside, f"{file.relative_to(ROOT)} imports {sorted(outside)}, above its floor"


def test_routing_needs_torch_and_nothing_else() -> None:
    for file in sorted((ROOT / "routing").rglob("*.py")):
        roots = {m.split(".")[0] for m in imported_modules(file.read_text(encoding="utf-8"), "moesaic.routing")}
        assert roots <= {"torch", "moesaic", *sys.stdlib_module_names}, f"{file.name} imports {sorted(roots)}"


def test_errors_import_nothing_of_ours() -> None:
    assert not own_rooms((ROOT / "errors.py").read_text(encoding="utf-8"), "moesaic")


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from moesaic.lora import mix", {"lora"}),
        ("import moesaic.training.run", {"training"}),
        ("from moesaic import training", {"training"}),
        ("def f():\n    from ..lora.mix import mix", {"lora"}),
        ("from .. import cli", {"cli"}),
        ("from .gates import Gate", {"routing"}),
        ("import torch", set()),
    ],
)
def test_the_import_rule_sees_every_way_to_import(source: str, rooms: set[str]) -> None:
    assert own_rooms(source, "moesaic.routing") == rooms


def test_importing_the_package_is_light() -> None:
    probe = f"import sys, moesaic; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_methods_needs_no_extra() -> None:
    probe = "import sys, moesaic; moesaic.HotMoEConfig; print([m for m in ('trl', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_the_report_load_no_drawing_library() -> None:
    probe = """
import sys
import moesaic.report.charts, moesaic.report.page, moesaic.report.topics
from moesaic.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
print("matplotlib" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
