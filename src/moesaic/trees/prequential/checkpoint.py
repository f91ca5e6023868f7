"""A run's checkpoints: learner, figures and rows whose label is still to come, together in one folder.

row-N/state.safetensors  row-N/state.json  (end/ once the run is finished)

The newest is kept. It is written whole or not at all, and the one before it goes only after that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import AdapterError, ConfigError, MissingDependency, MoesaicError, first_line
from moesaic.runs.folder import atomic_folder, check_writable, discard, writing
from moesaic.runs.settings import differences
from moesaic.runs.states import read_state, write_state
from moesaic.trees.prequential.learner import Stateful, ensure

FORMAT = 3
END = "end"
_ROW = "row-"


class Checkpoints:
    """The checkpoints of one run in its folder.

    Args:
        settings: what makes it the same run; compared with what is stored.
    Raises:
        ConfigError: no such folder can be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        check_writable(folder, f"folder={folder}")
        if folder.is_file():
            raise ConfigError(f"folder={folder} is a file; name a folder")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they are read back: tuples are lists

    @property
    def newest(self) -> Path | None:
        """Where the newest lies; None where there is none."""
        if (self.folder / END).is_dir():
            return self.folder / END
        rows = {int(p.name.removeprefix(_ROW)): p for p in self._all() if p.name.removeprefix(_ROW).isdecimal()}
        return rows[max(rows)] if rows else None

    def _all(self) -> list[Path]:
        return [p for p in (*self.folder.glob(f"{_ROW}*"), self.folder / END) if p.is_dir()]

    def save(self, parts: Mapping[str, Stateful], row: int, *, finished: bool = False) -> None:
        """Keep what the parts know after so many rows.

        Raises:
            ConfigError: a part cannot be kept, or the folder cannot be written.
        """
        states = {name: part.state() for name, part in parts.items()}
        place = self.folder / (END if finished else f"{_ROW}{row}")
        arrays = {f"{part}/{name}": array for part, (held, _) in states.items() for name, array in held.items()}
        values = {part: held for part, (_, held) in states.items()}
        with writing(place), atomic_folder(place) as staging:
            write_state(staging, arrays, {"settings": self.settings, "values": values}, version=FORMAT)
        for other in self._all():
            if other != place:
                discard(other)

    def load(self, parts: Mapping[str, Stateful]) -> None:
        """Let the parts become what the newest checkpoint holds, in their order; the first that is damaged ends it.

        Raises:
            ConfigError: it is of a run with other settings.
            AdapterError: it is damaged.
        """
        place = self.newest
        assert place is not None
        try:
            arrays, stored = read_state(place, version=FORMAT)
            values, before = stored["values"], stored["settings"]
            changed = differences(before, self.settings)
            for name, part in () if changed else parts.items():
                own = [key for key in arrays if key.startswith(f"{name}/")]
                ensure(isinstance(values.get(name), dict), f"its {name} is not there")
                part.restore({key.removeprefix(f"{name}/"): arrays[key].copy() for key in own}, values[name])
        except MissingDependency:
            raise
        except Exception as error:  # whatever safetensors, and parts, make of damage
            what = "" if isinstance(error, MoesaicError) else f"{type(error).__name__} "
            raise AdapterError(f"{place} is damaged ({what}{first_line(error)}): remove it to begin anew") from None
        if changed:
            raise ConfigError(f"{self.folder} holds a run with {changed}: set it back to go on, or name another folder")
