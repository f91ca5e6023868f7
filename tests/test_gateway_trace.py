"""The trace by itself: a file that cannot be written, or cannot go on in a new one."""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from moesaic.llms.gateway import trace
from moesaic.llms.gateway.calls import Call
from moesaic.llms.gateway.trace import TraceLog


def test_a_trace_that_could_not_go_on_does_once_it_can(tmp_path: Path) -> None:
    file, log = tmp_path / "t.jsonl", TraceLog(tmp_path / "t.jsonl", 10_000, 1)
    (tmp_path / "t.jsonl.1" / "full").mkdir(parents=True)
    log.write([Call(1, "k", "/", "m" * 100)] * 20)
    for _ in range(2):
        with pytest.raises(OSError, match="directory"):
            log.write([Call(2, "k", "/", "m" * 100)] * 10)
    (tmp_path / "t.jsonl.1" / "full").rmdir()
    (tmp_path / "t.jsonl.1").rmdir()
    log.write([Call(0xABC, "k", "/", "m" * 100)] * 10)
    log.close()
    assert [json.loads(line)["request"] for line in file.read_text().splitlines()] == ["abc"] * 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_trace_on_a_full_device_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").symlink_to("/dev/full")
    log = TraceLog(tmp_path / "t.jsonl", 10_000, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="space"):
            log.write([Call(1, "k", "/", "m")])
    log.close()


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FileIO):
        def write(self, text: Any) -> int:
            if super().tell() > 300:
                raise OSError(28, "No space left on device")
            return super().write(bytes(text)[:100])

    file, log = tmp_path / "t.jsonl", TraceLog(tmp_path / "t.jsonl", 10_000, 1)
    log.write([Call(1, "k", "/", "m")])
    log.close()
    whole = file.read_bytes()
    monkeypatch.setattr(trace, "FileIO", Full)
    with pytest.raises(OSError, match="space"):
        log.write([Call(2, "k", "/", "m")])
    assert file.read_bytes() == whole
