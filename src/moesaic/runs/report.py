"""report.html of one run's folder, out of the files that training, evaluation and composing left there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, first_line
from moesaic.report.page import is_page
from moesaic.report.runs import KICKER, page
from moesaic.runs.folder import check_writable, read_json, write_text
from moesaic.runs.results import steps_told

SPLITS = ("test", "validation", "train")
"""The order in which they count."""


def write_report(place: Path, *, method: str, model: str, settings: dict[str, Any], adapter: Path) -> Path:
    """Write the page of a folder, and return where it is.

    Args:
        place: where figures lie: results.json, metrics.jsonl (or a Trainer's trainer_state.json, here or in the
            adapter's folder), eval-SPLIT.json, samples-SPLIT.json; each may be missing.
        settings: the recipe, or what is known of one.

    Raises:
        ConfigError: one of the files is damaged, or report.html is another page.
    """
    target = check_report(place)
    results = _optional(place / "results.json") or {}
    run = {
        "name": place.resolve().name,
        "method": method,
        "model": model,
        "settings": settings,
        "results": results,
        "trained": steps_told(results) if "steps" in results else "",
        "curve": _curve(place, adapter),
        "scores": _by_split(place, "eval"),
        "samples": {split: found["rows"] for split, found in _by_split(place, "samples").items()},
        "experts": _experts(adapter, settings),
    }
    try:
        text = page(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{place} holds figures that no run writes: {first_line(error)}") from None
    write_text(target, text)
    return target


def check_report(place: Path) -> Path:
    """Where a folder's page goes. Raises ConfigError where that is another page, or cannot be written."""
    target = place / "report.html"
    if target.is_symlink() or (target.exists() and not is_page(target, KICKER)):
        raise ConfigError(f"{target} is no page of a run: move it away")
    check_writable(target, str(target))
    return target


def _optional(file: Path) -> Any:
    return read_json(file) if file.exists() else None


def _by_split(place: Path, what: str) -> dict[str, Any]:
    found = {split: _optional(place / f"{what}-{split}.json") for split in SPLITS}
    return {split: content for split, content in found.items() if content}


def _curve(place: Path, adapter: Path) -> list[dict[str, Any]]:
    """What was logged by step, the newest Trainer's state where we wrote no metrics."""
    metrics = place / "metrics.jsonl"
    if metrics.is_file():
        try:
            return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{metrics} is damaged: {first_line(error)}") from None
    states = [folder / "trainer_state.json" for folder in (place, adapter, *place.glob("checkpoint-*"))]
    state = max((file for file in states if file.is_file()), key=lambda file: file.stat().st_mtime, default=None)
    return [] if state is None else list(read_json(state).get("log_history", []))


def _experts(adapter: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Experts that have names, with where they came from, as far as it is known."""
    names = read_json(adapter / "adapter_config.json").get("experts") or []
    sources = (settings.get("adapter") or {}).get("adapters")
    known = sources if isinstance(sources, dict) else {}
    return {str(name): str(known.get(name, "")) for name in names}
