"""What was decided and what came of it: headers of an answer, and a log of one JSON object a line. No secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from moesaic.llms.gateway.calls import BILLED, PICO, Call

_JSON = json.JSONEncoder(separators=(",", ":")).encode
SHOWN = 16
"""Rounds in a header, which clients bound; the log has all."""
_UNFIT = re.compile(r"[^\x20-\x7e]")


def headers(call: Call) -> list[tuple[bytes, bytes]]:
    """x-moesaic-… of an answer, as far as it is known when they are sent; a streamed one's cost is not."""
    told = [(b"x-moesaic-request", b"%x" % call.id), (b"x-moesaic-attempts", b"%d" % call.tries())]
    if call.router:
        told += [
            (b"x-moesaic-router", _plain(call.router)), (b"x-moesaic-category", _plain(call.category)),
            (b"x-moesaic-confidence", b"%.4f" % (call.confidence or 0.0)), (b"x-moesaic-expert", _plain(call.expert)),
        ]  # fmt: skip
    if call.searches is not None:
        told.append((b"x-moesaic-router", _plain(call.asked)))
        if not call.stream:
            told.append((b"x-moesaic-rounds", _JSON(rounds(call)[:SHOWN]).encode()))
            told.append((b"x-moesaic-cost", b"%.9f" % (call.spent() / PICO)))
    if (model := call.served) is not None:
        told.append((b"x-moesaic-model", _plain(model.name)))
        told.append((b"x-moesaic-price", f"{model.input_price:g}/{model.output_price:g}".encode()))
        if not call.stream:
            told.append((b"x-moesaic-cost", b"%.9f" % (call.cost / PICO)))
    told.append((b"x-moesaic-latency", b"%.4f" % call.elapsed()))
    return told


def _plain(text: str) -> bytes:
    return _UNFIT.sub("?", text)[:200].encode("ascii")


def scores(call: Call) -> dict[str, float]:
    """What each expert was expected to score."""
    return {name: round(score, 4) for name, score in call.scores.items()}


def rounds(call: Call) -> list[dict[str, Any]]:
    """What a policy asked: whom, and what came of it."""
    return [
        {
            "request": f"{search.id:x}",
            "model": search.served.name if search.served else search.expert or None,
            "tokens": search.tokens() if search.ended in BILLED else (0, 0),
            "cost": search.cost / PICO,
            "latency": round(search.latency, 4),
            "said": search.attempts[-1]["said"] if search.attempts else None,
        }
        for search in call.searches or ()
    ]


def line(call: Call) -> dict[str, Any]:
    """A call as the log has it. Prompts only where `call.prompt` is set."""
    told: dict[str, Any] = {
        "time": datetime.fromtimestamp(call.started, UTC).isoformat(timespec="milliseconds"),
        "request": f"{call.id:x}", "key": call.key, "path": call.path, "asked": call.asked[:200],
        "model": call.served.name if call.served else None, "served_id": call.served_id or None,
        "status": call.status, "ended": call.ended, "stream": call.stream, "latency": round(call.latency, 4),
        "cost": call.cost / PICO, "reserved": call.reserved / PICO, "attempts": call.attempts,
        "tokens": {"own": [call.own_input, call.own_output], "backend": [call.backend_input, call.backend_output]},
    }  # fmt: skip
    if call.router:
        told |= {"router": call.router, "category": call.category, "confidence": call.confidence,
                 "uncertain": call.uncertain, "expert": call.expert, "kept": call.kept,
                 "scores": scores(call)}  # fmt: skip
    if call.searches is not None:
        told |= {"rounds": rounds(call), "budget": None if call.budget is None else call.budget / PICO}
    if call.within:
        told["within"] = f"{call.within:x}"
    if call.served is not None:
        told["price"] = {"input": call.served.input_price, "output": call.served.output_price}
    if call.prompt is not None:
        told["prompt"] = call.prompt
    return told


class TraceLog:
    """A file that goes on in a new one when it is full; FILE.1 is the one before, FILE.2 that before it.

    Not a handler of `logging`, which closes all of its handlers whenever somebody configures it. Written by one thread.
    """

    def __init__(self, file: Path | None, size: int, count: int) -> None:
        self._path, self._most, self._count = file, size, count
        self._file: FileIO | None = None
        if file is not None:
            from moesaic.runs.folder import writing

            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                self._file = FileIO(file, "a")

    def write(self, calls: Sequence[Call]) -> None:
        """Calls that have ended, all or none of them. Raises OSError, after which the next may be written again."""
        if self._path is None or not calls:
            return
        text = "".join([_JSON(line(call)) + "\n" for call in calls]).encode()
        file = self._file = self._file or FileIO(self._path, "a")
        if file.tell() + len(text) > self._most:
            file = self._turned()
        begin, rest = file.tell(), memoryview(text)
        try:
            while rest:
                rest = rest[file.write(rest) or 0 :]
        except OSError:
            with suppress(OSError):  # no half line is left, on what can be cut off
                file.truncate(begin)
            self.close()
            raise

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _turned(self) -> FileIO:
        """An empty file, after those that are full have moved up by one."""
        assert self._path is not None
        self.close()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{i + 1}") for i in range(self._count))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)
        self._file = FileIO(self._path, "w")
        return self._file
