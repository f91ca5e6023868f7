"""Two processes for the demo: its runs are small, and each is fastest on one core."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from moesaic.errors import TrainingError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Processes that run a function on several items at a time."""

    def __init__(self, connections: Iterable[Connection]) -> None:
        self._idle = list(connections)

    def each(self, function: Callable[..., Result], items: Iterable[Item], *rest: Any) -> Iterator[tuple[Item, Result]]:
        """`function(item, *rest)` of every item, as they end; the function is one of a module."""
        left, busy = list(items), dict[Connection, Item]()
        while left or busy:
            while left and self._idle:
                worker = self._idle.pop()
                busy[worker] = left.pop(0)
                with _alive():
                    worker.send((function, busy[worker], rest))
            for worker in cast("list[Connection]", wait(list(busy))):
                item = busy.pop(worker)
                with _alive():
                    result = worker.recv()
                self._idle.append(worker)
                if isinstance(result, BaseException):
                    raise result
                yield item, result


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise TrainingError("a process of the demo was ended from outside; the same command goes on") from None


@contextmanager
def _shielded() -> Iterator[None]:
    """Ctrl-C waits: processes that start now must not see it before they are in a session of their own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def workers(number: int = 2) -> Iterator[Workers]:
    """Interrupted, what they train is saved, as when `moesaic train` is asked to stop, before it goes on raising."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(min(number, os.cpu_count() or 1))]
    processes = [context.Process(target=_work, args=(theirs,)) for _, theirs in pipes]
    with _shielded():
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
    try:
        yield Workers(ours for ours, _ in pipes)
    except BaseException as error:
        for process in processes:
            process.terminate()
        if isinstance(error, KeyboardInterrupt):
            said = "stopped; what is trained is kept, and the same command goes on from there"
            raise KeyboardInterrupt(said) from None
        raise
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in processes:
            process.join()


def _work(tasks: Connection) -> None:
    """One thread, no signals of the terminal, and an end once there is nobody to send tasks."""
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import torch

    from moesaic.runs.process import set_up_stderr

    torch.set_num_threads(1)
    set_up_stderr(verbose=False)
    while True:
        try:
            function, item, rest = tasks.recv()
            try:
                result = function(item, *rest)
            except Exception as error:
                result = error
            tasks.send(result)
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            return


def _end_with(parent: int) -> None:
    """Stop, as if asked to, once the process that began this one has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
