"""Folders that a command may write into: empty ones, and those it wrote itself."""

from __future__ import annotations

from collections.abc import Collection, Set
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError
from moesaic.runs.folder import discard, read_json, write_json
from moesaic.runs.settings import differences

SETTINGS, RESULTS = "settings.json", "results.json"


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


def check_unfinished(folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigError for a finished run that is not to be replaced."""
    if (folder / RESULTS).exists() and not overwrite:
        raise ConfigError(f"{folder} holds a finished run; overwrite=true replaces it, out=… goes elsewhere")


def check_same(folder: Path, described: dict[str, Any], what: str) -> None:
    """Raise ConfigError where a folder holds `what` with other settings than those that are asked for now."""
    if changed := differences(read_json(folder / SETTINGS), described):
        raise ConfigError(
            f"{folder} holds {what} with {changed}: set it back to go on, or overwrite=true, or another out="
        )


def prepare(
    folder: Path, described: dict[str, Any], made: Collection[str], *, overwrite: bool, unfinished: bool
) -> None:
    """Of a folder that is locked: an unfinished run of the same settings stays; what is to be replaced goes.

    Args:
        described: what makes two runs the same one, kept as settings.json.
        made: what a run leaves beside that and its results.
        unfinished: whether there is something to go on from.
    Raises:
        ConfigError: it holds a finished run, or an unfinished one with other settings, and `overwrite` is not asked.
    """
    check_unfinished(folder, overwrite=overwrite)  # another process may have been faster
    file = folder / SETTINGS
    changed = differences(read_json(file), described) if file.is_file() else ""
    if changed and unfinished and not overwrite:
        check_same(folder, described, "an unfinished run")
    if changed or overwrite or (folder / RESULTS).exists():
        for part in (folder / name for name in (RESULTS, *made)):
            if part.is_dir():
                discard(part)
            else:
                part.unlink(missing_ok=True)
    write_json(file, described)
