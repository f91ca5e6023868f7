"""Cells: the runs of a comparison, each a process of its own, here or on a Ray cluster.

A process of its own means that a crash harms nothing else, that peak memory is the run's, and that threads are set
before libraries count them. It trains, then scores; what is finished already it does not do again. It ends with the
process that started it, however that ends, and its log stays locked for as long: a cell that another process runs is
left to it.
"""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from moesaic.compare import scores
from moesaic.errors import ConfigError
from moesaic.evaluation.settings import EvalSettings
from moesaic.runs.cluster import on_ray
from moesaic.runs.folder import RunFolder, claim, locked, read_json, write_json, write_text, writing
from moesaic.runs.process import exit_code
from moesaic.runs.recipe import Recipe, dump, load_recipe, parse_settings
from moesaic.runs.results import trained
from moesaic.runs.settings import differences

Status = Literal["done", "failed", "pending"]

_LOOK_EVERY = 0.1
_PATIENCE = 120.0
"""Seconds: a process whose worker has died writes a checkpoint before it ends."""


@dataclass(frozen=True)
class Job:
    """One run, trained by `recipe` in `recipe.out`, then scored: on `split`, `limit` rows a task, `base` too or not.

    `rows_sha256` is the digest of these rows: scores on others, or without the base, are made again.
    """

    name: str
    recipe: Recipe
    split: str
    limit: int | None
    base: bool
    threads: int
    rows_sha256: str

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.recipe.out))

    @property
    def scores(self) -> Path:
        return self.run.path / f"eval-{self.split}.json"

    @property
    def predictions(self) -> Path:
        return self.run.path / f"predictions-{self.split}.jsonl"

    @property
    def failure(self) -> Path:
        return self.run.path / "failed.json"

    def commands(self) -> list[list[str]]:
        """What of `moesaic train` and `moesaic eval` is left to do."""
        folder = str(self.run.path)
        limit = [] if self.limit is None else [f"limit={self.limit}"]
        evaluate = ["eval", folder, f"split={self.split}", *limit, f"base={str(self.base).lower()}"]
        train = [] if self.run.finished else [["train", folder, f"out={folder}"]]
        scored = scores.is_of(self.scores, self.rows_sha256, base=self.base) and self.predictions.is_file()
        return [*train, *([evaluate] if train or not scored else [])]


@dataclass(frozen=True)
class Outcome:
    """How a job stands; `score` is the mean over tasks, `error` one line, `seconds` those of this attempt."""

    job: Job
    status: Status
    error: str | None = None
    score: float | None = None
    seconds: float = 0.0


def state(job: Job) -> Outcome:
    """What the job's folder says; a damaged one counts as failed.

    Raises:
        ConfigError: it holds a run with other settings, such as another rate chosen since a failed trial succeeded.
    """
    if job.run.recipe.is_file():
        try:
            stored = load_recipe(str(job.run.recipe))
        except ConfigError as error:
            return _damaged(job, error)
        changed = differences(stored.describes(), job.recipe.describes())
        if changed:
            raise ConfigError(f"{job.run.path} holds a run with {changed}: remove that folder to run it again")
    if not job.commands():
        try:
            return Outcome(job, "done", score=scores.mean_of(job.scores, job.predictions))
        except ConfigError as error:
            return _damaged(job, error)
    if job.failure.is_file():
        with contextlib.suppress(ConfigError):
            return Outcome(job, "failed", str(read_json(job.failure).get("error")))
    return Outcome(job, "pending")


def _damaged(job: Job, error: ConfigError) -> Outcome:
    return Outcome(job, "failed", f"{error}; remove {job.run.path} to run it again")


def run_job(job: Job, stops: Callable[[], int] = lambda: 0, *, patience: float = 0.0) -> Outcome:
    """Run what is left of a job in a process of its own, and wait for it.

    Args:
        stops: how often the user has asked to stop: once lets the process write a checkpoint, twice ends it at once.
        patience: seconds to wait for another process that runs it, as the one that a dead worker has left may do.
    """
    if not job.commands():
        return state(job)
    folder, start, log = job.run.path, time.monotonic(), job.run.path / "log.txt"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    with file:
        until = time.monotonic() + patience
        while not (free := claim(file) and not _is_locked(folder)) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY)
        if not free:
            return Outcome(job, "pending", "another process runs it")
        with writing(folder):
            file.truncate(0)
            job.failure.unlink(missing_ok=True)
            if not job.run.recipe.is_file():
                write_text(job.run.recipe, dump(job.recipe))
        threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with subprocess.Popen(  # a session of its own: Ctrl-C in the terminal reaches it through us, once
            [sys.executable, "-m", "moesaic.compare.cells", json.dumps(job.commands())],
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        ) as process:
            code, asked = _wait(process, stops)
    seconds = time.monotonic() - start
    if code == 0 and not job.commands():
        return replace(state(job), seconds=seconds)
    if asked:
        return Outcome(job, "pending", "stopped", seconds=seconds)
    error = _reason(log, code) if code else f"it was not scored on the planned rows of data={job.recipe.data}"
    if code and job.run.finished:
        error += f" (it was trained, not scored; remove {folder} to train it again)"
    write_json(job.failure, {"error": error, "code": code})
    return Outcome(job, "failed", error, seconds=seconds)


def _is_locked(folder: Path) -> bool:
    """Whether a process writes the run, which may have been started by hand."""
    try:
        with locked(folder):
            return False
    except ConfigError:
        return True


def _wait(process: "subprocess.Popen[bytes]", stops: Callable[[], int]) -> tuple[int, int]:
    """(exit code, how often it was asked to stop)."""
    asked = 0
    try:
        while process.poll() is None:
            if stops() > asked:
                asked += 1
                process.terminate()
            time.sleep(_LOOK_EVERY)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return int(process.returncode), asked


def _reason(log: Path, code: int) -> str:
    """Why a process ended: our own last word on it, or its last line of any kind and its code."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("moesaic: ") for line in lines if line.startswith("moesaic: ")]
    if ours and code > 0:
        return ours[-1]
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"its process {how}" + (f"; it last said: {lines[-1]}" if lines else "")


def main(commands: Sequence[Sequence[str]]) -> int:
    """Do what of `moesaic train` and `moesaic eval` is left, in this process: libraries are loaded once.

    Returns the exit code.
    """

    def run() -> None:
        from moesaic.evaluation.run import evaluate_run
        from moesaic.training.run import train

        for command in commands:
            sys.argv = ["moesaic", *command]  # what a run's results call the command it was made with
            verb, folder, *settings = command
            if verb == "train":
                print(*trained(train(load_recipe(folder, settings))), sep="\n")
            else:
                evaluate_run(folder, parse_settings(EvalSettings, settings))

    return exit_code(run)


def end_with_parent() -> None:
    """Stop, as if asked to, once the pipe on stdin ends: when the process that holds its other end has ended."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()


# -- engines: many jobs at a time; each yields outcomes as jobs end ----------------------------------------------------


def local(jobs: Sequence[Job], *, workers: int) -> Generator[Outcome]:
    """Processes on this machine. Interrupted, it lets those that run write a checkpoint before it goes on raising."""
    stops = 0
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: set[Future[Outcome]] = {pool.submit(run_job, job, lambda: stops) for job in jobs}
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
    finally:
        while True:
            stops += 1
            with contextlib.suppress(KeyboardInterrupt):
                pool.shutdown(wait=True, cancel_futures=True)
                break


def ray_cluster(jobs: Sequence[Job], *, gpus: float) -> Generator[Outcome]:
    """Tasks of a Ray cluster; a job whose worker dies is gone on with by another.

    Raises:
        MissingDependency: the `ray` extra is not installed.
    """
    with on_ray(partial(run_job, patience=_PATIENCE), jobs, cpus=lambda job: job.threads, gpus=gpus) as ended:
        for job, found in ended:
            yield Outcome(job, "failed", found) if isinstance(found, str) else found


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(json.loads(sys.argv[1])))
