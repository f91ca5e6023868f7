"""A child process with a JVM of its own, started, asked and ended from here; this process never imports capymoa.

A child that ends by itself is noticed at the next frame, as `WorkerDied`; who asked starts another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from moesaic.errors import ConfigError, MissingDependency
from moesaic.runs.results import peak_memory_of
from moesaic.trees.jvm_worker import CPU, HEADER, IMPOSSIBLE

WORKER = Path(__file__).with_name("jvm_worker.py")
HEAP = 8192
"""MiB, as in CapyMOA."""
SHARE = 0.75
"""Of the memory that is free, at most so much is the JVM's."""
FLAGS = "-XX:+ExitOnOutOfMemoryError -XX:-UsePerfData -Xrs"
"""A tree that ran out of memory has learned half a row: the process ends, and another one learns it again. Signals
end it at once, and it leaves no file."""
PATIENCE = 3.0
"""Seconds to end by itself, and again after SIGTERM."""
JAVA = "install OpenJDK 17 or newer (Debian and Ubuntu: apt install default-jre-headless) or set JAVA_HOME to one"


class WorkerDied(Exception):
    """The child has ended; the text says how."""


class Refused(Exception):
    """The child is well and answers with an error; the text is Java's, or its own."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Worker:
    """One child process with a JVM.

    Args:
        settings: what it is to hold, as JSON.
        heap: MiB that Java's objects may take; less where less is free.
        script: what it runs, `WORKER` where none is given.
        spent: where to note, once it has ended, the CPU seconds that it used.
    Raises:
        MissingDependency: capymoa is not installed.
        ConfigError: there is no Java, it does not start, or the settings are impossible.
        WorkerDied: it ended while it started.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        heap: int = HEAP,
        script: Path | None = None,
        spent: list[float] | None = None,
    ) -> None:
        check_java()
        self._spent: list[float] = [] if spent is None else spent
        self._said: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script or WORKER), json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"CAPYMOA_JVM_ARGS": jvm_arguments(heap)},
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._listener = threading.Thread(target=_listen, args=(self._process.stderr, self._said), daemon=True)
        self._listener.start()
        self._end = weakref.finalize(self, _end, self._process, os.getpid(), self._spent)
        try:
            told = self._answer()
        except Refused as refused:
            self.close()
            known = refused.status == IMPOSSIBLE
            raise ConfigError(str(refused) if known else f"Java does not start ({refused}): {JAVA}") from None
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = json.loads(told[2])

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, operation: int, a: int = 0, b: int = 0, payload: bytes | bytearray = b"") -> None:
        """A frame that has no answer; it leaves with those that follow, for each way to the child costs more than it
        does there. Raises WorkerDied."""
        self._write(HEADER.pack(operation, a, b, len(payload)) + payload)

    def _write(self, frame: bytes, *, flush: bool = False) -> None:
        try:
            self._in.write(frame)
            if flush:
                self._in.flush()
        except (OSError, ValueError):
            raise WorkerDied(self._how()) from None
        except BaseException:
            self.close()  # half a frame: nothing can follow
            raise

    def ask(self, operation: int, a: int = 0, b: int = 0, payload: bytes | bytearray = b"") -> tuple[int, int, bytes]:
        """A frame's answer: a, b and payload. Raises WorkerDied, and Refused where it is an error."""
        self._write(HEADER.pack(operation, a, b, len(payload)) + payload, flush=True)
        return self._answer()

    def cpu_seconds(self) -> float:
        """CPU seconds that it used since it was started, of all its threads. Raises WorkerDied.

        What it was told before is done by then, so that it counts.
        """
        (seconds,) = struct.unpack("<d", self.ask(CPU)[2])
        return float(seconds)

    def peak_memory(self) -> float:
        """MiB that it held at most; 0 where the system does not tell."""
        try:
            return peak_memory_of(self.pid)
        except OSError:
            return 0.0

    def close(self) -> None:
        """End it: its input closes, then SIGTERM, then SIGKILL. Once is enough, and so is forgetting it."""
        self._end()

    def _answer(self) -> tuple[int, int, bytes]:
        try:
            head = self._out.read(HEADER.size)
            if len(head) == HEADER.size:
                status, a, b, size = HEADER.unpack(head)
                payload = self._out.read(size)
                if len(payload) == size:
                    if status:
                        raise Refused(payload.decode(errors="replace"), status)
                    return a, b, payload
        except (OSError, ValueError):
            pass  # its end of the pipe, or ours, is closed
        except Refused:
            raise
        except BaseException:
            self.close()  # the rest of the answer would be taken for the next one's
            raise
        raise WorkerDied(self._how())

    def _how(self) -> str:
        self.close()
        self._listener.join(PATIENCE)
        code = self._process.returncode
        how = f"exit code {code}"
        if code is not None and code < 0:
            with suppress(ValueError):
                how = signal.Signals(-code).name
        lines = [line for line in self._said if line.strip()]
        return f"{how}; {lines[-1].strip()}" if lines else how

    def __repr__(self) -> str:
        return f"Worker(pid={self.pid}, {'open' if self._end.alive else 'closed'})"


def _listen(stream: IO[bytes], said: deque[str]) -> None:
    with suppress(OSError, ValueError), stream:
        for line in stream:
            said.append(line.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes], owner: int, spent: list[float]) -> None:
    if os.getpid() != owner:
        return  # a fork of the process that holds it
    before = _of_children()
    try:
        _wait(process)
    finally:
        spent.append(_of_children() - before)


def _of_children() -> float:
    """CPU seconds of children that were waited for; 0 where the system does not tell."""
    told = os.times()
    return told.children_user + told.children_system


def _wait(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        with suppress(OSError, AttributeError):
            stream.close()  # type: ignore[union-attr]
    for end in (process.terminate, process.kill):
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
            return
        end()
    process.wait()


def check_java() -> None:
    """Whether a child can be tried at all.

    Raises:
        MissingDependency: capymoa is not installed.
        ConfigError: no Java is found.
    """
    if importlib.util.find_spec("capymoa") is None:
        raise MissingDependency("capymoa", "capymoa")
    home = os.environ.get("JAVA_HOME")
    if home is not None and not Path(home).is_dir():
        raise ConfigError(f"JAVA_HOME is {home}, and there is no such folder: {JAVA}")
    if home is None and shutil.which("java") is None:
        raise ConfigError(f"CapyMOA's trees need Java, and there is no java on the PATH: {JAVA}")


def jvm_arguments(heap: int) -> str:
    """What the JVM is started with; what CAPYMOA_JVM_ARGS asks for stays, its heap excepted. `heap`: MiB."""
    free = available_memory()
    given = heap if free is None else max(64, min(heap, int(free * SHARE) >> 20))
    asked = os.environ.get("CAPYMOA_JVM_ARGS", "-XX:+UseSerialGC")  # one thread's garbage is collected by one thread
    return f"{asked} {FLAGS} -Xmx{given}m"


def available_memory() -> int | None:
    """Bytes that this process and its children can still have, or None where the system does not tell."""
    found = []
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(found)) if found else None
