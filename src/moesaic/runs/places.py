"""Folders that a command may write into: empty ones, and those it wrote itself."""

from __future__ import annotations

from collections.abc import Collection, Set
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.folder import read_json

SETTINGS = "settings.json"


def check_ours(folder: Path, what: str, settings: Set[str], made: Collection[str] | None = None) -> None:
    """Raise ConfigError for a folder that holds something, and not `what`.

    Args:
        what: a stream run, a comparison of streams …
        settings: some that its settings.json has, which is the first to be there.
        made: names of all that it may hold, hidden files apart; None where people put more beside it.
    """
    if folder.is_file():
        raise ConfigError(f"out={folder} is a file; name a folder")
    there = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} if folder.is_dir() else set()
    if (made is not None and there - {*made}) or (there and not settings <= _read(folder / SETTINGS).keys()):
        raise ConfigError(f"out={folder} holds files that are not {what}'s; name another folder")


def _read(file: Path) -> dict[str, Any]:
    """Settings; none where they are missing or damaged."""
    try:
        return read_json(file)
    except ConfigError:
        return {}
