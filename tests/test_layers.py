"""Who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).parent
ALLOWED = {
    "routing": {"routing", "errors"},
    "host": {"host", "routing", "errors"},
    "lora": {"lora", "host", "routing", "errors", "models"},
    "adapters": {"adapters", "lora", "host", "routing", "errors"},
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


def own_rooms(source: str, package: str) -> set[str]:
    """First component after `moesaic.` of everything a file imports from the project; "" for the package itself."""
    ours = [m for m in imported_modules(source, package) if m.split(".")[0] == "moesaic"]
    return {[*m.split("."), ""][1] for m in ours}


@pytest.mark.parametrize("room", sorted(ALLOWED))
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
