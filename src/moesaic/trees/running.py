"""Runs of learners on streams, as people write them and as they lie on disk.

settings.json  checkpoint/  model/ (of ours: `moesaic.trees.load`)  report.html  results.json (last: it is finished)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import ConfigError, UnknownSetting, path_of, suggest
from moesaic.runs.folder import check_writable, locked, read_json, reading, write_json, write_text, writing
from moesaic.runs.places import RESULTS, SETTINGS, check_ours, check_unfinished, prepare
from moesaic.runs.results import command_line, versions
from moesaic.runs.settings import build, check_keys, lists, names, parse_overrides, texts
from moesaic.trees import needed

if TYPE_CHECKING:
    from moesaic.trees.streams import Stream

CHECKPOINT, REPORT, MODEL = "checkpoint", "report.html", "model"
PARTS = (CHECKPOINT, REPORT, MODEL)
MADE = (SETTINGS, RESULTS, *PARTS)
PACKAGES = ("river", "capymoa", "numba", "numpy")


@dataclass
class StreamRun:
    """One learner on one stream. `out` and `overwrite` say where; the rest says what, and is kept with it."""

    stream: str = field(
        default="", metadata={"help": "a generator's name, a data set's, or a CSV, ARFF or Parquet file"}
    )
    learner: str = field(
        default="driftmoe", metadata={"help": "driftmoe, driftmoe-paper, nochange, river-arf, capymoa-arf, river:M.C …"}
    )
    length: int | None = field(default=None, metadata={"help": "rows at most; generators make 100,000"})
    source: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the stream: source.noise=0.2 source.target=label …"}
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the learner: model.n_experts=10 model.backend=river …"}
    )
    seed: int = field(default=0, metadata={"help": "of the stream's generator and of the learner"})
    window: int = field(default=1000, metadata={"help": "rows of a window"})
    delay: int = field(default=0, metadata={"help": "rows by which labels come late"})
    every: int = field(default=10_000, metadata={"help": "rows between checkpoints"})
    out: str = field(default="", metadata={"help": "run folder; runs/<stream>-<learner>-s<seed> where left out"})
    overwrite: bool = field(default=False, metadata={"help": "replace a run that is there"})

    def folder(self) -> Path:
        if self.out:
            return path_of(self.out)
        learner = self.learner.replace(":", "-")
        return Path("runs") / f"{Path(self.stream).name.split('.')[0]}-{learner}-s{self.seed}"

    def describes(self) -> dict[str, Any]:
        """What makes two runs the same one."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "overwrite", "every")}

    def opened(self) -> Stream:
        """Its stream. Raises as `open_stream` does."""
        from moesaic.trees.streams import open_stream, settings_of

        known = settings_of(self.stream)
        if unknown := self.source.keys() - known:
            name = min(unknown)
            raise UnknownSetting(f"{self.stream} has no setting source.{name}; {suggest(name, known)}", name)
        return open_stream(self.stream, self.length, self.seed, **self.source)


def load_run(arguments: Sequence[str]) -> StreamRun:
    """`key=value` settings to a run. Raises ConfigError for an unknown key (naming the nearest), or a wrong value."""
    if arguments and "=" not in arguments[0]:
        arguments = [f"stream={arguments[0]}", *arguments[1:]]
    given = parse_overrides(arguments, lists=lists(StreamRun), texts=texts(StreamRun), sections=("source", "model"))
    check_keys("settings", given, names(StreamRun))
    made = build(StreamRun, {}, given)
    if not made.stream:
        raise ConfigError("stream is missing: stream=led_a, a data set's name, or a file")
    for key, least in (("window", 1), ("delay", 0), ("every", 1), ("seed", 0)):
        if getattr(made, key) < least:
            raise ConfigError(f"{key}={getattr(made, key)} must be at least {least}")
    if made.length is not None and made.length < 1:
        raise ConfigError(f"length={made.length} must be at least 1")
    return made


def run(wanted: StreamRun, *, command: str | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Run it, or go on where it was interrupted; returns what is written to results.json.

    Raises:
        MoesaicError: of the kind that fits; nothing that is there is lost.
        KeyboardInterrupt: after a checkpoint, when interrupted.
    """
    needed()
    from moesaic.report.streams import page
    from moesaic.trees.learners import is_kept, learner
    from moesaic.trees.prequential import prequential

    folder = _place(wanted)
    stream = wanted.opened()
    made = learner(wanted.learner, stream, seed=wanted.seed, delay=wanted.delay, given=wanted.model)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            held = any(entry.is_dir() for entry in (folder / CHECKPOINT).glob("*"))
            prepare(folder, wanted.describes(), PARTS, overwrite=wanted.overwrite, unfinished=held)
            found = prequential(
                stream, made, window=wanted.window, delay=wanted.delay, progress=progress, every=wanted.every,
                folder=folder / CHECKPOINT if is_kept(made) else None, settings={"learner": wanted.learner},
            )  # fmt: skip
            _keep(made, stream, folder / MODEL)
            results = {
                **found.as_json(), "skipped": stream.skipped.count,
                "skipped_first": next(iter(stream.skipped.reasons), None),
                "labelled": stream.labelled,
                "learner": wanted.learner, "seed": wanted.seed, "settings": wanted.describes(),
                "command": command or command_line(), "versions": versions(PACKAGES),
            }  # fmt: skip
            write_text(folder / REPORT, page([results]))
            write_json(folder / RESULTS, results)
    finally:
        made.close()
    return results


def _keep(made: Any, stream: Stream, folder: Path) -> None:
    """A learner of ours, as a classifier that is used elsewhere."""
    from moesaic.trees.classifier import DriftMoEClassifier
    from moesaic.trees.driftmoe import DriftMoE

    if isinstance(made, DriftMoE):
        DriftMoEClassifier.of(made, stream.features, stream.classes).save(folder, overwrite=True)


def finished(folder: Path) -> dict[str, Any]:
    """The results of a run folder. Raises ConfigError where there are none."""
    if not (folder / RESULTS).is_file():
        raise ConfigError(f"{folder} holds no finished run on a stream: `moesaic stream run` makes one")
    found = read_json(folder / RESULTS)
    if not {"stream", "learner"} <= found.keys():
        raise ConfigError(f"{folder} holds a finished run, but none on a stream")
    from moesaic.report.streams import page

    with reading(folder / RESULTS):
        for part in ("settings", "versions"):
            found[part].items()
        page([found])
    return found


def _place(wanted: StreamRun) -> Path:
    """Where the run lies. Raises ConfigError for a place that holds anything else."""
    folder = wanted.folder()
    check_writable(folder, f"out={folder}")
    check_ours(folder, "a stream run", {"stream", "learner", "window"}, MADE)
    check_unfinished(folder, overwrite=wanted.overwrite)
    return folder
