"""docs/compatibility.md is what the checks find: by default each method and each check once, with `-m slow` all."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import compatibility

ROOT = Path(__file__).parent.parent
WRITTEN = json.loads((ROOT / "results" / "compatibility.json").read_text())


def script() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility_script", ROOT / "scripts" / "compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKS = [(table, name) for table, checks in compatibility.TABLES.items() for name in checks]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", compatibility.METHODS_TOLD)
@pytest.mark.parametrize("check", CHECKS, ids=[name.replace(" ", "-") for _, name in CHECKS])
def test_what_is_written_is_so(check: tuple[str, str], method: str) -> None:
    table, name = check
    found = compatibility.outcome(lambda: compatibility.TABLES[table][name](method))
    assert plain(found) == plain(WRITTEN["tables"][table][name][method])


def plain(text: str) -> str:
    """Without what differs by run: folders of adapters."""
    return re.sub(r"\S*/\S+", "PATH", text)


def test_the_page_is_of_all_methods_and_checks() -> None:
    tables = WRITTEN["tables"]
    assert {(table, name) for table in tables for name in tables[table]} == set(CHECKS)
    for checks in tables.values():
        for row in checks.values():
            assert list(row) == compatibility.METHODS_TOLD
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert page == script().page(tables, WRITTEN["versions"])
