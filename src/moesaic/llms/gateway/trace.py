"""What was decided and what came of it: headers of an answer, and a log of one JSON object a line. No secrets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from moesaic.llms.gateway.calls import PICO, Call

logger = logging.getLogger(__name__)

_UNFIT = re.compile(r"[^\x20-\x7e]")


def headers(call: Call) -> list[tuple[bytes, bytes]]:
    """x-moesaic-… of an answer, as far as it is known when they are sent; a streamed one's cost is not."""
    told: dict[str, Any] = {"request": f"{call.id:x}", "attempts": len(call.attempts)}
    if call.router:
        told |= {"router": call.router, "category": call.category, "confidence": f"{call.confidence:.4f}",
                 "expert": call.expert}  # fmt: skip
    if call.served is not None:
        told["model"] = call.served.name
        told["price"] = f"{call.served.input_price:g}/{call.served.output_price:g}"
        if not call.stream:
            told["cost"] = f"{call.cost / PICO:.9f}"
    told["latency"] = f"{call.elapsed():.4f}"
    return [(b"x-moesaic-" + name.encode(), _plain(value)) for name, value in told.items()]


def _plain(value: Any) -> bytes:
    return _UNFIT.sub("?", str(value))[:200].encode("ascii")


def line(call: Call) -> dict[str, Any]:
    """A call as the log has it. Prompts only where `call.prompt` is set."""
    told = {
        "time": datetime.fromtimestamp(call.started, UTC).isoformat(timespec="milliseconds"),
        "request": f"{call.id:x}", "key": call.key, "path": call.path, "asked": call.asked[:200],
        "model": call.served.name if call.served else None, "served_id": call.served_id or None,
        "status": call.status, "ended": call.ended, "stream": call.stream, "latency": round(call.latency, 4),
        "cost": call.cost / PICO, "reserved": call.reserved / PICO, "attempts": call.attempts,
        "tokens": {"own": [call.own_input, call.own_output], "backend": [call.backend_input, call.backend_output]},
    }  # fmt: skip
    if call.router:
        told |= {"router": call.router, "category": call.category, "confidence": call.confidence,
                 "uncertain": call.uncertain, "expert": call.expert, "kept": call.kept}  # fmt: skip
    if call.prompt is not None:
        told["prompt"] = call.prompt
    return told


class TraceLog:
    """A file that goes on in a new one when it is full. Written by one thread."""

    def __init__(self, file: Path | None, size: int, count: int) -> None:
        self._file = None
        if file is not None:
            from moesaic.runs.folder import writing

            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                self._file = RotatingFileHandler(file, maxBytes=size, backupCount=count, encoding="utf-8")
                self._file.setFormatter(logging.Formatter())

    def write(self, calls: Sequence[Call]) -> None:
        if self._file is None:
            return
        for call in calls:
            text = json.dumps(line(call), separators=(",", ":"))
            self._file.handle(logging.LogRecord("trace", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
