"""The ledger by itself: exact sums, limits in any minute, periods, settlement once, and what a dead process left."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Model
from moesaic.llms.gateway.calls import LARGEST, PICO, Call, price
from moesaic.llms.gateway.keys import Key
from moesaic.llms.gateway.ledger import MINUTE, Ledger, Window
from moesaic.llms.gateway.trace import TraceLog
from moesaic.llms.gateway.writer import UNBOOKED, Writer

MODEL = Model("m", input_price=0.1, output_price=0.3, parameters=1)


class Books:
    """A ledger with a clock of its own, one transaction an entry."""

    def __init__(self, file: Path) -> None:
        self.now, self.file = 1e9, file
        self.ledger = Ledger(file, clock=lambda: self.now)
        self.made = 0

    def reserve(self, key: Key, amount: int = 0, tokens: int = 1) -> Call | str:
        self.made += 1
        call = Call(self.made, key.id, "/v1/chat/completions", "m", started=self.now)
        call.reserved = amount
        self.ledger.begin()
        refusal = self.ledger.reserve(call, key, tokens)
        self.ledger.commit()
        return refusal.message if refusal else call

    def settle(self, call: Call | str, cost: int = 0) -> bool:
        assert isinstance(call, Call)
        call.cost, call.ended = cost, "whole"
        self.ledger.begin()
        done = self.ledger.settle(call)
        self.ledger.commit()
        return done

    def reopened(self) -> Books:
        """As a process that was killed leaves them to the next."""
        self.ledger._lock.close()
        after = Books(self.file)
        after.now, after.made = self.now, self.made
        return after


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    found = Books(tmp_path / "ledger.sqlite")
    yield found
    found.ledger.close()


def test_prices_are_exact() -> None:
    assert price(MODEL, 3, 7) == 3 * 100_000 + 7 * 300_000
    assert sum(price(MODEL, 1, 0) for _ in range(10**5)) == PICO // 100


def test_a_budget_is_kept_to_the_last_picodollar(books: Books) -> None:
    key = Key(id="k", budget=0.3)
    tenth = PICO // 10
    calls = [books.reserve(key, tenth) for _ in range(3)]
    assert "of which 0.000000 are left" in str(books.reserve(key, 1))
    assert books.settle(calls[0], tenth - 5)
    assert isinstance(books.reserve(key, 5), Call)
    assert isinstance(books.reserve(key, 1), str)
    assert books.ledger.balance(key) == pytest.approx((0.1, 0.2))


def test_who_has_spent_all_is_refused_even_what_is_free(books: Books) -> None:
    key = Key(id="k", budget=0.1)
    books.settle(books.reserve(key, 0), PICO)  # more than was reserved
    assert "budget" in str(books.reserve(key, 0))
    assert isinstance(books.reserve(Key(id="other", budget=0.1), 0), Call)


def test_settlement_happens_once(books: Books) -> None:
    key = Key(id="k", budget=1.0)
    call = books.reserve(key, 100)
    assert [books.settle(call, 7), books.settle(call, 7), books.settle(call, 9)] == [True, False, False]
    assert books.ledger.balance(key) == (7 / PICO, 0)


def test_periods_begin_anew(books: Books) -> None:
    day, month = Key(id="d", budget=1.0, period="day"), Key(id="m", budget=1.0, period="month")
    books.now = 1_700_000_000.0  # 2023-11-14 22:13:20
    late = books.reserve(day, PICO // 2)
    for key in (day, month):
        books.settle(books.reserve(key, PICO // 2), PICO // 2)
    books.now += 2 * 3600
    assert books.ledger.balance(day) == (0, 0.5)
    assert books.ledger.balance(month) == (0.5, 0)
    books.settle(late, PICO // 2)  # of the day before
    assert books.ledger.balance(day) == books.reopened().ledger.balance(day) == (0, 0)


def test_limits_hold_in_any_minute(books: Books) -> None:
    key = Key(id="k", requests_per_minute=2, tokens_per_minute=100)
    first = books.reserve(key, tokens=60)
    assert "100 tokens a minute" in str(books.reserve(key, tokens=50))
    books.now += 20
    books.reserve(key, tokens=40)
    assert "2 requests a minute" in str(books.reserve(key, tokens=0))
    books.now += MINUTE - 20
    assert "may take 101" in str(books.reserve(key, tokens=101))
    assert isinstance(books.reserve(key, tokens=60), Call)
    assert isinstance(first, Call)


def test_tokens_that_were_not_used_are_given_back(books: Books) -> None:
    key = Key(id="k", tokens_per_minute=100)
    call = books.reserve(key, tokens=90)
    assert isinstance(call, Call)
    call.served, call.own_input, call.own_output = MODEL, 6, 4
    books.settle(call)
    assert isinstance(books.reserve(key, tokens=90), Call)
    assert isinstance(books.reserve(key, tokens=1), str)
    assert isinstance(books.reopened().reserve(key, tokens=1), str)


def test_only_so_many_run_at_once(books: Books) -> None:
    key = Key(id="k", at_once=2)
    calls = [books.reserve(key) for _ in range(2)]
    assert "2 requests of this key are running" in str(books.reserve(key))
    books.settle(calls[0])
    assert isinstance(books.reserve(key), Call)


def test_what_a_dead_process_reserved_is_spent(books: Books) -> None:
    key = Key(id="k", budget=1.0)
    books.settle(books.reserve(key, 300), 100)
    books.reserve(key, 500)
    after = books.reopened()
    assert after.ledger.abandoned == 1
    assert after.ledger.balance(key) == (600 / PICO, 0)
    base = sqlite3.connect(books.file)
    assert base.execute("SELECT state, cost FROM calls ORDER BY id").fetchall() == [
        ("settled", 100),
        ("abandoned", 500),
    ]
    assert after.reopened().ledger.abandoned == 0


def test_two_processes_cannot_keep_one_ledger(books: Books) -> None:
    with pytest.raises(ConfigError, match="another gateway keeps these books"):
        Ledger(books.file)


@pytest.mark.skipif(sys.platform != "linux", reason="the ledger itself is locked on Linux alone")
@pytest.mark.parametrize("by", ["a symbolic link", "a hard link", "its name, the lock file gone"])
def test_a_ledger_is_kept_once_by_whatever_name(books: Books, tmp_path: Path, by: str) -> None:
    other = tmp_path / "elsewhere" / "ledger"
    other.parent.mkdir()
    if by == "a symbolic link":
        other.symlink_to(books.file)
    elif by == "a hard link":
        other.hardlink_to(books.file)
    else:
        books.file.with_name(books.file.name + ".lock").unlink()
        other = books.file
    with pytest.raises(ConfigError, match="another gateway keeps these books"):
        Ledger(other)
    assert isinstance(books.reserve(Key(id="k", budget=1.0), 100), Call)
    books.ledger.close()
    again = Ledger(other)
    assert again.abandoned == 1
    again.close()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"no database at all, and long enough to be read as one" * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        Ledger(tmp_path / "l")


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=30), st.integers(1, 8))
def test_a_window_admits_what_a_naive_count_of_the_last_minute_admits(
    arrivals: list[tuple[int, int]], most: int
) -> None:
    window, taken, now = Window(), list[tuple[float, int]](), 0
    for i, (pause, amount) in enumerate(arrivals):
        now += pause
        used = sum(n for at, n in taken if at > now - MINUTE)
        wait = window.wait(amount, most, now)
        assert (wait == 0) == (used + amount <= most)
        if wait == 0:
            window.add(now, i, amount)
            taken.append((now, amount))
        elif wait is not None:
            later = now + wait
            assert sum(n for at, n in taken if at > later - MINUTE) + amount <= most


def test_a_clock_that_was_set_back_shuts_nobody_out(books: Books) -> None:
    key = Key(id="k", requests_per_minute=2)
    assert [isinstance(books.reserve(key), Call) for _ in range(3)] == [True, True, False]
    books.now -= 3600
    assert isinstance(books.reserve(key), Call)
    after = books.reopened()
    assert isinstance(after.reserve(key), Call)
    assert isinstance(after.reserve(key), str)


def test_balances_outgrow_what_a_column_holds(books: Books) -> None:
    for _ in range(3):
        books.settle(books.reserve(Key(id="k")), LARGEST)
    assert books.reopened().ledger._account(Key(id="k"), books.now).spent == 3 * LARGEST


class Broken(Ledger):
    """A ledger whose disk is full for some of its transactions."""

    full = 0

    def commit(self) -> None:
        if self.full:
            self.full -= 1
            raise sqlite3.OperationalError("database or disk is full")
        super().commit()


def test_while_nothing_can_be_written_nobody_is_admitted_and_nothing_is_lost(tmp_path: Path) -> None:
    key = Key(id="k", budget=1.0)

    async def run() -> None:
        ledger = Broken(tmp_path / "ledger.sqlite")
        writer = Writer(ledger, TraceLog(None, 0, 0))
        call = Call(1, "k", "/", "m")
        call.reserved = 500
        assert await writer.reserve(call, key, 1) is None
        ledger.full = 2
        call.served, call.ended, call.own_input = MODEL, "whole", 10
        writer.settle(call)
        refusal = await writer.reserve(Call(2, "k", "/", "m"), key, 1)
        assert refusal is not None
        assert refusal.ours
        await writer.written()
        assert ledger.full == 0
        assert await writer.reserve(Call(3, "k", "/", "m"), key, 1) is None
        await writer.close()

    asyncio.run(run())
    base = sqlite3.connect(tmp_path / "ledger.sqlite")
    assert base.execute("SELECT id, state, cost FROM calls ORDER BY id").fetchall() == [
        (1, "settled", 1_000_000), (3, "reserved", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("field", ["category", "own_input"])
def test_a_settlement_that_cannot_be_holds_up_nobody(
    tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = Key(id="k", budget=1.0, at_once=1)

    async def run() -> None:
        writer = Writer(Ledger(tmp_path / "ledger.sqlite"), TraceLog(None, 0, 0))
        call = Call(1, "k", "/", "m")
        call.reserved = 500
        assert await writer.reserve(call, key, 1) is None
        setattr(call, field, {"category": "x\ud800", "own_input": 2**70}[field])
        writer.settle(call)
        await writer.written()
        assert writer.ledger.balance(key) == (500 / PICO, 0)
        assert await writer.reserve(Call(2, "k", "/", "\ud800"), key, 1) is UNBOOKED
        assert await writer.reserve(Call(3, "k", "/", "m"), key, 1) is None
        await writer.close()

    asyncio.run(run())
    base = sqlite3.connect(tmp_path / "ledger.sqlite")
    assert base.execute("SELECT id, state, cost FROM calls ORDER BY id").fetchall() == [
        (1, "abandoned", 500), (3, "reserved", 0),
    ]  # fmt: skip
    assert sum("booked" in line for line in caplog.messages) == 2


def test_a_gateway_stops_though_its_books_cannot_be_written(tmp_path: Path) -> None:
    async def run() -> None:
        ledger = Broken(tmp_path / "ledger.sqlite")
        writer = Writer(ledger, TraceLog(None, 0, 0))
        call = Call(1, "k", "/", "m")
        assert await writer.reserve(call, Key(id="k"), 1) is None
        ledger.full = 10**9
        writer.settle(call)
        assert await asyncio.wait_for(writer.close(0.2), 5) == 1

    asyncio.run(run())
    assert Ledger(tmp_path / "ledger.sqlite").abandoned == 1


def test_a_caller_who_leaves_while_it_is_admitted_reserves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        writer = Writer(Ledger(tmp_path / "ledger.sqlite"), TraceLog(None, 0, 0))
        key = Key(id="k", budget=1.0, at_once=1)
        waiting = asyncio.create_task(writer.reserve(Call(1, "k", "/", "m"), key, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await writer.written()
        assert await writer.reserve(Call(2, "k", "/", "m"), key, 1) is None
        await writer.close()

    asyncio.run(run())


def test_a_trace_goes_on_in_new_files(tmp_path: Path) -> None:
    log = TraceLog(tmp_path / "t.jsonl", 10_000, 2)
    for i in range(200):
        log.write([Call(i, "k", "/", "m")])
    log.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.jsonl", "t.jsonl.1", "t.jsonl.2"]
    assert all(file.stat().st_size <= 10_000 for file in tmp_path.iterdir())
    assert b'"request":"c7"' in (tmp_path / "t.jsonl").read_bytes()
