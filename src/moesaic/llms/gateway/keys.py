"""The keys that requests bring: kept as hashes, compared in constant time, and guessed slowly."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address

from moesaic.errors import ConfigError

PERIODS = ("total", "month", "day")
SHORTEST = 16
"""Characters of a key that comes out of the environment."""
GUESSES, BLOCKED, ADDRESSES = 20, 60.0, 4096
"""Wrong keys of one address that close it, for how many seconds, and how many addresses are watched."""


@dataclass(frozen=True)
class Key:
    """What one key may do.

    Attributes:
        id: how books, traces and metrics call it. hash: sha256:HEX of the key; or env: the variable that holds it.
        budget: USD in a `period` (total | month | day, of UTC); None for no end.
        requests_per_minute, tokens_per_minute: in any 60 seconds. at_once: requests.
    """

    id: str = ""
    hash: str = ""
    env: str = ""
    budget: float | None = None
    period: str = "total"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    at_once: int | None = None

    def check(self) -> None:
        """Raise ConfigError for what no key can be."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.id):
            raise ConfigError(f"a key's id is 1 to 64 letters, digits and . _ -, not {self.id[:80]!r}")
        if bool(self.hash) == bool(self.env):
            raise ConfigError(f"key {self.id}: give hash: sha256:… or env: VARIABLE; keys themselves stand nowhere")
        if self.period not in PERIODS:
            raise ConfigError(f"key {self.id}: period={self.period} must be {', '.join(PERIODS)}")
        for what in ("budget", "requests_per_minute", "tokens_per_minute", "at_once"):
            value = getattr(self, what)
            if value is not None and not 0 <= value <= 1e6 * (1e6 if what == "tokens_per_minute" else 1):
                raise ConfigError(f"{what}={value} of key {self.id} must be at least 0 and at most a million")

    def digest(self) -> bytes:
        """SHA-256 of the key. Raises ConfigError where it is not to be had."""
        if self.hash:
            kind, _, digits = self.hash.partition(":")
            if kind != "sha256" or not re.fullmatch("[0-9a-f]{64}", digits):
                raise ConfigError(f"key {self.id}: hash must be sha256: and 64 hexadecimal digits")
            return bytes.fromhex(digits)
        key = os.environ.get(self.env, "")
        if len(key) < SHORTEST or not (key.isascii() and key.isprintable()) or key != key.strip():
            raise ConfigError(f"key {self.id}: {self.env} must hold a key of {SHORTEST} printable characters or more")
        return sha256(key.encode()).digest()


ANYBODY = Key(id="anybody")
"""Who asks where no keys are set."""


def new_key() -> tuple[str, str]:
    """A key of 256 bits for somebody, and its hash for the file."""
    key = "mo-" + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """What stands in the file for a key."""
    return "sha256:" + sha256(key.encode()).hexdigest()


class Keys:
    """Keys by digest.

    What is looked up is the SHA-256 of what was given, so that no time that it takes tells of a key's characters.
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        self._by_digest: dict[bytes, Key] = {}
        for key in keys:
            key.check()
            if (digest := key.digest()) in self._by_digest:
                raise ConfigError(f"keys {self._by_digest[digest].id} and {key.id} are one: each has a key of its own")
            self._by_digest[digest] = key
        if len({key.id for key in keys}) < len(keys):
            raise ConfigError("two keys have one id; the books could not tell them apart")

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def find(self, given: bytes) -> Key | None:
        digest = sha256(given).digest()
        found = None
        for held, key in self._by_digest.items():
            if hmac.compare_digest(held, digest):
                found = key
        return found


class Guesses:
    """Addresses that brought wrong keys; after too many an address is closed for a while, to right keys too.

    An IPv6 address counts as its /64.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def blocked(self, address: str) -> float:
        """Seconds that an address is closed for; 0 where it is open."""
        if not self._wrong:
            return 0.0
        count, since = self._wrong.get(_network(address), (0, 0.0))
        left = since + BLOCKED - self._clock()
        return left if count >= GUESSES and left > 0 else 0.0

    def wrong(self, address: str) -> None:
        network, now = _network(address), self._clock()
        count, since = self._wrong.pop(network, (0, now))
        if now - since > BLOCKED:
            count, since = 0, now
        self._wrong[network] = (count + 1, now if count + 1 == GUESSES else since)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)


def _network(address: str) -> str:
    if ":" not in address:
        return address
    try:
        return ip_address(address.partition("%")[0]).exploded[:19]
    except ValueError:
        return address
