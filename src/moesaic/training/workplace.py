"""Where a conversion is written: what may be replaced, and a place of its own for rounds that are done."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moesaic.errors import ConfigError, path_of
from moesaic.runs.conversion import Conversion
from moesaic.runs.folder import check_writable, locked, read_json, write_json, writing
from moesaic.runs.settings import differences

logger = logging.getLogger(__name__)

RESULTS, SETTINGS = "conversion.json", "settings.json"


def place_of(wanted: Conversion) -> Path:
    """Where the model is written. Raises ConfigError for a place that holds anything but a conversion to replace."""
    out = path_of(wanted.out)
    check_writable(out, f"out={wanted.out}")
    if out.is_file():
        raise ConfigError(f"out={wanted.out} is a file; name a folder")
    out = out.resolve()
    if out in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"out={wanted.out} is the folder that this runs in, or one around it; name another")
    source = path_of(wanted.model).resolve()
    if source.exists() and (out == source or out in source.parents or source in out.parents):
        raise ConfigError(f"out={wanted.out} and model={wanted.model} lie in each other: write somewhere else")
    if (out.parent / RESULTS).is_file():
        raise ConfigError(f"out={wanted.out} lies in a converted model: write somewhere else")
    if out.is_dir() and any(out.iterdir()):
        if not (out / RESULTS).is_file():
            raise ConfigError(f"out={wanted.out} holds files that are not a conversion's; name another folder")
        if not wanted.overwrite:
            raise ConfigError(f"{wanted.out} holds a converted model; overwrite=true replaces it, out=… goes elsewhere")
    return out


@contextmanager
def working(out: Path, wanted: Conversion, made_of: Mapping[str, str]) -> Iterator[Path]:
    """The hidden folder beside `out` that rounds are kept in, for this process alone; gone when all is done.

    Args:
        made_of: digests of what the settings only name, such as text and weights.
    """
    work = out.with_name(f".{out.name}.rounds")
    described = wanted.describes() | {**made_of}
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        try:
            place_of(wanted)  # another process may have been faster
            file = work / SETTINGS
            changed = differences(read_json(file), described) if file.is_file() else "settings that are lost"
            if file.is_file() and changed and not wanted.overwrite:
                raise ConfigError(
                    f"there is an unfinished conversion to {out} with {changed}: set it back to go on, or "
                    "overwrite=true, or another out="
                )
            for number in rounds_in(work) if changed else ():
                shutil.rmtree(work / str(number), ignore_errors=True)
            write_json(file, described)
            yield work
        except BaseException:
            if done := rounds_in(work):
                logger.warning("%s: round %d is kept, and the same command goes on from there", wanted.out, done[-1])
            else:
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def rounds_in(work: Path) -> list[int]:
    """Numbers of the rounds that are kept."""
    return sorted(int(folder.name) for folder in work.glob("[0-9]*") if folder.name.isdecimal())
