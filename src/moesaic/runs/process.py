"""A command as a process: what it says on stderr, and its exit code."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moesaic.errors import DataError, MoesaicError, first_line


def exit_code(command: Callable[[], int | None], *, verbose: bool = False) -> int:
    """Run a command: what it returns; 2 for a mistake that can be mended, told in one line; 130 if interrupted."""
    set_up_stderr(verbose)
    try:
        return command() or 0
    except MoesaicError as error:
        return _told(" ".join(str(error).split()), 2)
    except KeyboardInterrupt as error:
        return _told(str(error) or "interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        return _told(first_line(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return _told(f"out of memory: make what was asked for smaller ({first_line(error)})", 2)


def standard_input() -> str:
    """All of it. Raises DataError where it is no text."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read()
        text.encode()  # in some locales Python takes any byte for a text
    except UnicodeError:
        raise DataError("standard input is no text in UTF-8") from None
    return text


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_memory(error: Exception) -> bool:
    """Whether memory was asked for that is not there; torch has no class of its own for a CPU's."""
    return isinstance(error, MemoryError) or any(said in str(error) for said in ("allocate memory", "out of memory"))


def _told(message: str, code: int) -> int:
    print(f"moesaic: {message}", file=sys.stderr)
    return code


def set_up_stderr(verbose: bool) -> None:
    """Our warnings as plain lines; other libraries' bars are for terminals, and their deprecation notices for us."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
