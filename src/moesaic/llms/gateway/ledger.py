"""The books: every call reserves what it may cost before it is made, and is settled with what it did cost.

One thread of one process writes them (locks see to it). SQLite's log is written ahead (WAL), so that what was
committed outlives a process that is killed. A reservation that a dead process left is settled at the next start, at
the whole amount that was reserved: nobody knows what of it was spent, and a budget must not be spent twice.
"""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, first_line
from moesaic.llms.gateway.calls import PICO, SEARCH, Call
from moesaic.llms.gateway.keys import Key

MINUTE = 60.0

_TABLE = """
CREATE TABLE IF NOT EXISTS calls (
  id INTEGER PRIMARY KEY,   -- nanoseconds since 1970, or the next number that is free
  started REAL NOT NULL, key TEXT NOT NULL, path TEXT NOT NULL, asked TEXT NOT NULL,
  state TEXT NOT NULL,      -- reserved | settled | abandoned
  reserved INTEGER NOT NULL, reserved_tokens INTEGER NOT NULL,
  cost INTEGER NOT NULL DEFAULT 0,   -- picodollars, as `reserved` is
  router TEXT, category TEXT, expert TEXT, served TEXT, served_id TEXT,
  own_input INTEGER, own_output INTEGER, backend_input INTEGER, backend_output INTEGER,
  latency REAL, attempts INTEGER, status INTEGER, ended TEXT
);
CREATE INDEX IF NOT EXISTS calls_by_key ON calls (key, started);
CREATE INDEX IF NOT EXISTS calls_open ON calls (state) WHERE state = 'reserved';
"""
_RESERVE = (
    "INSERT INTO calls (id, started, key, path, asked, state, reserved, reserved_tokens) "
    "VALUES (?, ?, ?, ?, ?, 'reserved', ?, ?)"
)
_SETTLE = (
    "UPDATE calls SET state = 'settled', cost = ?, router = ?, category = ?, expert = ?, served = ?, served_id = ?, "
    "own_input = ?, own_output = ?, backend_input = ?, backend_output = ?, latency = ?, attempts = ?, status = ?, "
    "ended = ? WHERE id = ? AND state = 'reserved'"
)
_ABANDON = "UPDATE calls SET state = 'abandoned', cost = reserved, ended = 'abandoned' WHERE state = 'reserved'"


UNBOOKABLE = (
    ValueError, OverflowError, TypeError,
    sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
)  # fmt: skip
"""What one row may raise by itself; a lock, a full disk and a damaged file raise others."""


@dataclass(frozen=True)
class Refusal:
    """Why a call is not admitted, in one line.

    Attributes:
        wait: seconds until it may be; None where waiting does not help. ours: it is the gateway's fault.
    """

    message: str
    wait: float | None
    ours: bool = False


@dataclass
class Window:
    """What was used in the last 60 seconds: (time, call, amount), oldest first.

    What a clock that was set back leaves ahead of now counts no longer: it could shut a key out for hours.
    """

    entries: deque[list[Any]] = field(default_factory=deque)
    total: int = 0

    def wait(self, amount: int, most: int, now: float) -> float | None:
        """Seconds until `amount` more fit under `most`; None where they never will."""
        while self.entries and self.entries[0][0] <= now - MINUTE:
            self.total -= self.entries.popleft()[2]
        while self.entries and self.entries[-1][0] > now:
            self.total -= self.entries.pop()[2]
        if amount > most:
            return None
        excess, until = self.total + amount - most, now
        for started, _, used in self.entries:
            if excess <= 0:
                break
            excess, until = excess - used, started + MINUTE
        return until - now

    def add(self, now: float, call: int, amount: int) -> None:
        self.entries.append([now, call, amount])
        self.total += amount

    def correct(self, call: int, amount: int) -> None:
        """What a call that is over did use."""
        for entry in reversed(self.entries):
            if entry[1] == call:
                self.total += amount - entry[2]
                entry[2] = amount
                return


@dataclass
class Account:
    """One key's balance. spent, reserved: picodollars; `since`, when its period began; `open`, calls that run.

    `open` has of each when it started, what it reserved, and whether it is a request, no search of one.
    """

    since: float
    spent: int = 0
    reserved: int = 0
    open: dict[int, tuple[float, int, bool]] = field(default_factory=dict)
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)


class Ledger:
    """The books in a file. Not thread-safe: `Writer` asks it from one thread.

    Raises:
        ConfigError: the file cannot be had, or another process has it.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._accounts = clock, dict[str, Account]()
        try:
            self._lock = _locked(file)
            self._base = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            self._base.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + _TABLE)
            self.abandoned = self._base.execute(_ABANDON).rowcount
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"ledger {file}: {first_line(error)}; name another, or mend this one") from None

    def begin(self) -> None:
        self._base.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._base.execute("COMMIT")

    def undo(self) -> None:
        """After a failure: what was not committed is forgotten, and balances are read anew."""
        self._accounts.clear()
        if self._base.in_transaction:
            self._base.execute("ROLLBACK")

    def reserve(self, call: Call, key: Key, tokens: int) -> Refusal | None:
        """Take `call.reserved` picodollars and so many tokens off a key's balance, or say why not."""
        now = self._clock()
        account = self._account(key, now)
        refusal = _refusal(account, key, call, tokens, now)
        if refusal is None:
            given = (call.id, call.started, call.key, call.path, call.asked[:200], call.reserved, tokens)
            self._base.execute(_RESERVE, given)
            account.reserved += call.reserved
            account.open[call.id] = (call.started, call.reserved, call.path != SEARCH)
            if key.requests_per_minute is not None:
                account.requests.add(now, call.id, 1)
            if key.tokens_per_minute is not None:
                account.tokens.add(now, call.id, tokens)
        return refusal

    def settle(self, call: Call) -> bool:
        """Book what a call cost. False where it is settled already, which changes nothing."""
        served = call.served.name if call.served else None
        given = (
            call.cost, call.router, call.category, call.expert, served, call.served_id, call.own_input, call.own_output,
            call.backend_input, call.backend_output, call.latency, call.tries(), call.status, call.ended, call.id,
        )  # fmt: skip
        if not self._base.execute(_SETTLE, given).rowcount:
            return False
        account = self._accounts.get(call.key)
        if account is not None and call.id in account.open:
            started, reserved, _ = account.open.pop(call.id)
            account.reserved -= reserved
            account.spent += call.cost if started >= account.since else 0
            account.tokens.correct(call.id, sum(call.tokens()) if call.served else 0)
        return True

    def abandon(self, call: Call) -> None:
        """Book a call that cannot be settled at what it reserved."""
        self._base.execute(_ABANDON + " AND id = ?", (call.id,))
        account = self._accounts.get(call.key)
        if account is not None and call.id in account.open:
            started, reserved, _ = account.open.pop(call.id)
            account.reserved -= reserved
            account.spent += reserved if started >= account.since else 0

    def balance(self, key: Key) -> tuple[float, float]:
        """(spent, reserved) USD of a key in its period."""
        account = self._account(key, self._clock())
        return account.spent / PICO, account.reserved / PICO

    def close(self) -> None:
        self._base.close()
        self._lock.close()

    def _account(self, key: Key, now: float) -> Account:
        since = _since(key.period, now)
        account = self._accounts.get(key.id)
        if account is None:
            account = self._accounts[key.id] = self._read(key.id, since, now)
        elif account.since != since:  # a new period, or another kind of period in a file read anew
            fresh = self._read(key.id, since, now)
            account.since, account.spent = since, fresh.spent
        return account

    def _read(self, key: str, since: float, now: float) -> Account:
        account = Account(since)
        dollars, rest = self._base.execute(  # a sum of whole costs could be too large for SQLite
            "SELECT coalesce(sum(cost / ?), 0), coalesce(sum(cost % ?), 0) FROM calls WHERE key = ? AND started >= ?",
            (PICO, PICO, key, since),
        ).fetchone()
        account.spent = dollars * PICO + rest
        rows = self._base.execute(
            "SELECT id, started, reserved, path <> ? FROM calls WHERE state = 'reserved' AND key = ?", (SEARCH, key)
        ).fetchall()
        account.open = {number: (started, reserved, bool(own)) for number, started, reserved, own in rows}
        account.reserved = sum(reserved for _, reserved, _ in account.open.values())
        last = self._base.execute(
            "SELECT started, id, CASE state WHEN 'settled' THEN coalesce(backend_input, own_input) + "
            "coalesce(backend_output, own_output) ELSE reserved_tokens END FROM calls WHERE key = ? AND started > ? "
            "AND started <= ? ORDER BY started",
            (key, now - MINUTE, now),
        )
        for started, number, tokens in last:
            account.requests.add(started, number, 1)
            account.tokens.add(started, number, tokens)
        return account


def _refusal(account: Account, key: Key, call: Call, tokens: int, now: float) -> Refusal | None:
    running, amount = sum(own for *_, own in account.open.values()), call.reserved
    if key.at_once is not None and call.path != SEARCH and running >= key.at_once:
        return Refusal(f"{key.at_once} requests of this key are running, which is its limit", 1.0)
    for what, window, used, most in (
        ("requests", account.requests, 1, key.requests_per_minute),
        ("tokens", account.tokens, tokens, key.tokens_per_minute),
    ):
        if most is not None and (wait := window.wait(used, most, now)) != 0:
            needs = f", and this request may take {used:,}" if wait is None else ""
            return Refusal(f"this key has {most:,} {what} a minute{needs}", wait)
    if key.budget is not None:
        left = round(key.budget * PICO) - account.spent - account.reserved
        if amount > left or left <= 0:
            kind = {"total": "", "month": " a month", "day": " a day"}[key.period]
            return Refusal(
                f"this key's budget is {key.budget:g} USD{kind}, of which {max(left, 0) / PICO:.6f} are left; this "
                f"request may cost {amount / PICO:.6f}",
                None,
            )
    return None


def _since(period: str, now: float) -> float:
    """When the period began that `now` lies in, of UTC."""
    if period == "total":
        return 0.0
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day.replace(day=1) if period == "month" else day).timestamp()


def _locked(file: Path) -> ExitStack:
    """Locks on the ledger, by whatever name, and on a file beside it, which holds where a ledger is put anew."""
    from moesaic.runs.folder import claim, claim_byte, writing

    with writing(file), ExitStack() as held:
        place = file.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_file():
            raise ConfigError(f"ledger {file} is no file; name another")
        if claim(held.enter_context(place.with_name(place.name + ".lock").open("a"))) and claim_byte(
            held.enter_context(place.open("ab"))
        ):
            return held.pop_all()
    raise ConfigError(f"ledger {file}: another gateway keeps these books; give this one a ledger of its own")
