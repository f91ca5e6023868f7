"""The run folder: nothing half-written is ever seen under its final name, and nothing finished is lost.

recipe.yaml  layout.json  metrics.jsonl  checkpoints/checkpoint-N/  adapter/  results.json (last: the run is finished)

While a finished run goes on to more steps, recipe-next.yaml stands beside what it has come to so far.
"""

import glob
import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

from safetensors import SafetensorError

from moesaic.data.examples import SPLITS
from moesaic.errors import ConfigError, TrainingError, first_line
from moesaic.runs.recipe import load_recipe
from moesaic.runs.settings import differences, read_yaml

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_OLD = ".old-"
STAGING = ".staging"


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Write into the folder that is yielded; on leaving it appears as `final`, complete, or not at all.

    Raises:
        ConfigError: `final` is there and no folder.
    """
    if final.is_file() or _is_device(final):
        raise ConfigError(f"{final} is no folder; name another")
    final = final.resolve()
    if final in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"{final} is the folder that this runs in, or one around it; name another")
    settle(final)
    staging = _staging_of(final)
    discard(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(staging.parent)
        raise
    for file in staging.rglob("*"):
        _sync(file)
    _sync(staging)
    old = _old_of(final)
    if final.exists():
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)
    _remove_empty(staging.parent)
    _sync(final.parent)


def settle(final: Path) -> None:
    """Finish what `atomic_folder` began, where it was stopped after the old folder went and before the new one came."""
    old, staging = _old_of(final), _staging_of(final)
    if old.is_dir() and not final.exists():
        os.replace(staging if staging.is_dir() else old, final)
    for remains in (old, *_trash_of(final)):
        shutil.rmtree(remains, ignore_errors=True)


def _staging_of(final: Path) -> Path:
    return final.parent / STAGING / final.name


def _trash_of(place: Path) -> Iterator[Path]:
    return place.parent.glob(f".trash-{glob.escape(place.name)}-*")


def _old_of(final: Path) -> Path:
    return final.with_name(f"{_OLD}{final.name}")


def _is_device(place: Path) -> bool:
    """Whether there is something that is neither a file nor a folder: /dev/null, a pipe."""
    return place.exists() and not place.is_file() and not place.is_dir()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another writer's folder is in it
        folder.rmdir()


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all, and the folders that it is to be in."""
    part = _part(file)
    if _is_device(file):
        raise ConfigError(f"{file} is no file; name another")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            _sync(part)
            os.replace(part, file)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def _part(file: Path) -> Path:
    """Where a file is written before it takes its name."""
    return file.with_name(f".{file.name}.part")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a run. Raises ConfigError where it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is missing or damaged: {first_line(error)}; restore it, or make it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged: it holds no object; restore it, or make it again")
    return content


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what a file that was edited by hand lacks, or has of another kind, into a ConfigError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is damaged: {type(error).__name__} {first_line(error)}; remove it") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process for as long; a process that ends, however, gives it free.

    Raises:
        ConfigError: another process has it.
    """
    with writing(folder):
        file = (folder / ".lock").open("a")
    with file:
        if not claim(file):
            raise ConfigError(f"another process is writing {folder}: wait for it, or another out=")
        for old in folder.glob(f"{_OLD}*"):
            settle(folder / old.name.removeprefix(_OLD))
        yield


def claim(file: IO[Any]) -> bool:
    """Lock an open file for as long as it is open here or in a child process; False where another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def claim_byte(file: IO[Any]) -> bool:
    """As `claim`, by a byte far behind the end: what locks the rest of the file, as SQLite does, goes on doing so.

    Holds nothing where the system has no locks of open files (Windows, macOS).
    """
    if hasattr(fcntl, "F_OFD_SETLK"):
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 2**62, 1, 0))
        except OSError:
            return False
    return True


def check_writable(place: Path, asked: str) -> None:
    """Raise ConfigError where no file or folder can be made at `place`, which the setting `asked` names.

    Tried in the nearest folder there is, where nothing is left.
    """
    place = place.absolute()
    if not place.name:
        raise ConfigError(f"{asked} is the root of the file system; name another")
    if place.name == STAGING:
        raise ConfigError(f"{asked} is where folders lie while they are written; name another")
    try:
        if _is_device(place):
            raise ConfigError(f"{asked} is a device; name another")
        place.resolve()  # refuses links that lead in a circle
        if place.is_symlink() and not place.exists():
            raise ConfigError(f"{asked} is a link to what is not there; name another")
        _part(place).exists()  # refuses a name that is too long
        near = next(p for p in (place, *place.parents) if p.exists())
        with TemporaryFile(dir=near if near.is_dir() or near != place else near.parent):
            pass
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{asked} cannot be written: {said}; name another") from None


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the file system refuses (no space, no permission, no such folder) into a ConfigError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # torch.save has no better sign of a full disk than the name of its own source file
        place = getattr(error, "filename2", None) or getattr(error, "filename", None) or place
        raise ConfigError(
            f"cannot write {place}: {getattr(error, 'strerror', None) or first_line(error)}; "
            "what was written before is kept: make room or name another folder"
        ) from None


def discard(folder: Path) -> None:
    """Remove a folder so that, stopped half-way, its remains do not bear its name.

    What a link leads to, and the folder that this process is in, are emptied and stay. Raises ConfigError for `..`.
    """
    if not folder.exists():
        return
    place = folder.resolve()
    if not folder.is_absolute() and place in Path.cwd().parents:
        raise ConfigError(f"cannot replace {folder} from inside it: change to another folder")
    trash = place.with_name(f".trash-{place.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)  # of a process that had the same number
    if folder.is_symlink() or place.samefile("."):
        trash.mkdir()
        for entry in list(place.iterdir()):
            os.replace(entry, trash / entry.name)
    else:
        os.replace(place, trash)
    for remains in (trash, *_trash_of(place)):  # an interrupted one's too
        shutil.rmtree(remains, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunFolder:
    """A run's files. Creating the object touches nothing; `prepared` does.

    Args:
        load: reads the recipe, whichever kind it is of.
    """

    def __init__(self, path: Path, load: Callable[[str], Any] = load_recipe) -> None:
        self.path, self.load = path, load
        self.recipe = path / "recipe.yaml"
        self.next = path / "recipe-next.yaml"
        self.layout = path / "layout.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.results = path / "results.json"

    @property
    def finished(self) -> bool:
        return self.results.exists()

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{_PREFIX}{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [p.name.removeprefix(_PREFIX) for p in self.checkpoints.glob(f"{_PREFIX}*") if p.is_dir()]
        return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

    def damaged(self, step: int, why: str) -> TrainingError:
        """What is said of a checkpoint that cannot be gone on from."""
        others = len(self.steps()) > 1
        way = "remove it to go on from the one before it" if others else "overwrite=true trains again"
        return TrainingError(f"{self.checkpoint(step)} is damaged ({why}): {way}")

    def last_loss(self) -> float:
        """The task's loss that was logged last; NaN where none was."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        losses = (entry["loss"] for entry in map(json.loads, reversed(lines)) if "loss" in entry)
        return float(next(losses, math.nan))

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints."""
        for step in self.steps()[:-keep]:
            discard(self.checkpoint(step))

    @contextmanager
    def prepared(
        self,
        *,
        overwrite: bool,
        resume: str,
        description: dict[str, Any],
        layout: dict[str, Any],
        longer: dict[str, Any] | None = None,
    ) -> Iterator[int]:
        """Make the folder ready, keep it to this process, and yield the step to go on from (0: from the start).

        Args:
            description: the settings that make it the same run, compared with those of an unfinished one.
            layout: what was read off the data, compared likewise.
            longer: where a finished run is to go on, the description with as many steps as that has.
        Raises:
            ConfigError: the folder holds a finished run, another run, or something that is no run at all; or another
                process writes it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out={self.path} is a file; name a folder")
        there = self.path.is_dir() and any(self.path.iterdir())
        if there and not self.recipe.is_file():
            raise ConfigError(f"out={self.path} holds files that are not a run's; name another folder")
        if there and overwrite:
            with locked(self.path), writing(self.path):
                discard(self.path)
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            if there and not overwrite:
                self._check_unfinished(resume, description, layout, longer)
            for remains in (*self.path.glob(".*"), *self.checkpoints.glob(".*")):
                if remains.is_dir():
                    shutil.rmtree(remains, ignore_errors=True)
            step = max(self.steps(), default=0)
            self._truncate_metrics(step)
            yield step

    def _check_unfinished(
        self, resume: str, description: dict[str, Any], layout: dict[str, Any], longer: dict[str, Any] | None
    ) -> None:
        if self.finished and longer is None:
            raise ConfigError(f"{self.path} holds a finished run; overwrite=true replaces it, out=… goes elsewhere")
        if resume == "never":
            raise ConfigError(
                f"{self.path} holds an unfinished run; resume=auto continues it, overwrite=true replaces it"
            )
        self._compare(description if longer is None else longer, layout)
        if longer is not None and self.next.is_file():
            changed = differences(self.load(str(self.next)).describes(), description)
            if changed:
                raise ConfigError(
                    f"{self.path} is on its way to more steps, with {changed}: set it back to continue, or "
                    "overwrite=true, or another out="
                )

    def replaced(self, recipe: str) -> None:
        """Its adapter is about to be replaced by the one that a longer run made: what was said of it goes.

        From here on it is that run, which ends as soon as its results are written.
        """
        self.results.unlink(missing_ok=True)
        for split in SPLITS:
            for name in (f"eval-{split}.json", f"samples-{split}.json", f"predictions-{split}.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        write_text(self.recipe, recipe)
        self.next.unlink(missing_ok=True)

    def _compare(self, description: dict[str, Any], layout: dict[str, Any]) -> None:
        try:
            before = self.load(str(self.recipe)).describes()
        except ConfigError as error:
            raise ConfigError(f"{error}; overwrite=true or another out=") from None
        changed = differences(before, description)
        held = f"{self.path} holds {'a finished' if self.finished else 'an unfinished'} run"
        if changed:
            raise ConfigError(f"{held} with {changed}: set it back to continue, or overwrite=true, or another out=")
        if self.layout.is_file() and read_json(self.layout) != layout:
            raise ConfigError(f"{held} on other data; overwrite=true or another out=")

    def _truncate_metrics(self, step: int) -> None:
        """Drop what was logged after the step that is gone back to, and a last line cut short."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                break
        write_text(self.metrics, "".join(kept))


def run_path(folder: Path) -> RunFolder:
    """A run folder that can be evaluated: finished, or at least with an adapter. Raises ConfigError."""
    run = RunFolder(folder)
    if not run.recipe.is_file():
        if (folder / "conversion.json").is_file():
            raise ConfigError(f"{folder} is a converted model: `moesaic perplexity {folder}` scores it")
        outer = f"; it lies in one, {folder.parent}" if (folder.parent / "recipe.yaml").is_file() else ""
        raise ConfigError(
            f"{folder} is not a run folder: it has no recipe.yaml; `moesaic train` and compose make one{outer}"
        )
    if "architecture" in read_yaml(run.recipe):
        raise ConfigError(f"{folder} is a language model that was trained from nothing: `moesaic perplexity {folder}`")
    if not run.adapter.is_dir():
        raise ConfigError(f"{folder} is an unfinished run: run its `moesaic train` command again to finish it")
    return run
