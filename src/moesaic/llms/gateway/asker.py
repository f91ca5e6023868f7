"""A Router-R1 policy behind the gateway: it answers by itself, and asks the catalog's models in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moesaic.errors import ConfigError
from moesaic.llms.catalog import OWN, Catalog
from moesaic.llms.router_r1.engine import STEP, Policy, Rounds, Written
from moesaic.llms.router_r1.folder import Asking, file_of, load

AT_ONCE = 32
"""Rollouts of one policy that go on side by side; more wait for one to end."""

Stamp = tuple[Path, int, int, int]


class Stopped(Exception):
    """A rollout is to end."""


class Asker:
    """A policy that many rollouts share, each in a thread of its own.

    Attributes:
        name: what requests call it: moesaic/…
        asking: how it is asked. stamp: of the file that it was loaded from, if any.
        rolling: the rollouts' threads. writing: the one in which the policy writes, a generation at a time, as they
            were wanted; while a rollout waits for a reply, those of others are written.
    """

    def __init__(self, name: str, policy: Policy, asking: Asking, stamp: Stamp | None = None) -> None:
        self.name, self.policy, self.asking, self.stamp = name, policy, asking, stamp
        self.rolling = ThreadPoolExecutor(AT_ONCE, "rollout")
        self.writing = ThreadPoolExecutor(1, "policy")

    def answering(self, catalog: Catalog) -> Catalog:
        """Whom it may ask: the models that have an endpoint. Raises ConfigError where one that it learned is not there.

        It may ask others too, of which it reads what the catalog tells.
        """
        found = {model.name: model for model in catalog.values() if model.endpoint}
        for learned in self.asking.models:
            if catalog.resolve(learned).name not in found:
                raise ConfigError(f"{learned} has no endpoint")
        return Catalog(list(found.values()), catalog.source)


class Turns:
    """A policy as one rollout has it. What is read waits for the next turn to write.

    Attributes:
        tokens: that it wrote so far.
    """

    def __init__(self, asker: Asker, check: Callable[[], None]) -> None:
        """
        Args:
            check: raises Stopped where the rollout is to end; asked before each turn, and each token by who can.
        """
        self._asker, self._check = asker, check
        self._rounds: Rounds | None = None
        self._unread: list[tuple[int, str]] = []
        self.tokens = 0

    def begin(self, prompts: Sequence[str]) -> Turns:
        self._prompts = prompts
        return self

    def write(self, who: Sequence[int]) -> list[Written]:
        self._check()
        found = self._asker.writing.submit(self._turn, who).result()
        self.tokens += sum(written.tokens for written in found)
        return found

    def read(self, who: int, text: str) -> tuple[int, ...]:
        self._unread.append((who, text))
        return ()

    def clip(self, text: str, tokens: int) -> str:
        assert self._rounds is not None
        return self._rounds.clip(text, tokens)

    def _turn(self, who: Sequence[int]) -> list[Written]:
        self._check()
        STEP.set(self._check)
        if self._rounds is None:
            self._rounds = self._asker.policy.begin(self._prompts)
        for unread in self._unread:
            self._rounds.read(*unread)
        self._unread = []
        return self._rounds.write(who)


def open_asker(name: str, folder: Path, catalog: Catalog, held: object) -> Asker:
    """The policy of a folder: the one that is `held`, as long as it is the same.

    Raises:
        ConfigError: it learned to ask models that the catalog has not. AdapterError: it is damaged.
    """
    file = file_of(folder)
    found = file.stat()
    stamp = file, found.st_mtime_ns, found.st_size, found.st_ino
    asker = held if isinstance(held, Asker) and held.stamp == stamp else Asker(OWN + name, *load(folder), stamp)
    try:
        asker.answering(catalog)
    except ConfigError as error:
        raise ConfigError(f"{folder}: it learned to ask models that the catalog lacks: {error}") from None
    return asker
