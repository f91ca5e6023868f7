"""One request as the books, the trace and the metrics know it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.llms.catalog import Model

PICO = 10**12
"""Money is counted in whole millionths of a millionth of a USD, so that balances are exact."""

LARGEST = 2**63 - 1
"""Of what a column of the books holds."""

BILLED = ("whole", "drained", "partial", "broken")
"""Ends of a call that cost what came; any other costs nothing."""
SEARCH = "search"
"""In the place of a path, of a call that is a part of a request: one that a policy made."""
CUT = ("partial", "broken")
"""Ends of a call whose backend may not have told all."""


@dataclass(slots=True)
class Call:
    """A request, from its admission to its settlement.

    Attributes:
        id: the ledger's number of it. key: the id of the key. path: what was asked of which endpoint of ours.
        asked: the model that the request named. router, category, confidence, expert, scores: the decision, if any.
        served: the model that answered. served_id: what its endpoint called itself.
        attempts: each try: model, milliseconds (None where a breaker kept it from being asked), and "ok" or what went
            wrong.
        own_input, own_output: tokens by our count. backend_input, backend_output: by the backend's; None unless told.
        possible: tokens of prompt and answer beyond which the backend's count is no count; None where nobody knows.
        reserved_output: tokens that were put down for the answer, by model.
        reserved, cost: picodollars. status: of HTTP.
        ended: whole | drained | partial | broken (the backend broke off), billed for what came; cancelled | refused
            (the backend said no) | failed (nobody answered) | dry, not billed.
        searches: calls of a request that a policy answers, which are booked by themselves, and those that it wanted and
            was refused; None of any other request. within: the call that this one is a search of; 0 for a request.
        budget: picodollars that the searches may cost together; None for no end.
    """

    id: int
    key: str
    path: str
    asked: str
    started: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    router: str = ""
    category: str = ""
    confidence: float | None = None
    uncertain: bool = False
    expert: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    kept: bool = False
    served: Model | None = None
    served_id: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    stream: bool = False
    own_input: int = 0
    own_output: int = 0
    backend_input: int | None = None
    backend_output: int | None = None
    possible: tuple[int, int] | None = None
    reserved_output: Mapping[str, int] = field(default_factory=dict)
    reserved: int = 0
    cost: int = 0
    latency: float = 0.0
    status: int = 0
    ended: str = "failed"
    prompt: str | None = None
    searches: list[Call] | None = None
    within: int = 0
    budget: int | None = None

    def spent(self) -> int:
        """Picodollars of its own and of its searches."""
        return self.cost + sum(call.cost for call in self.searches or ())

    def tries(self) -> int:
        """How often a model was asked."""
        return sum(attempt["ms"] is not None for attempt in self.attempts)

    def elapsed(self) -> float:
        """Seconds since it was begun."""
        return time.perf_counter() - self.begun

    def tokens(self) -> tuple[int, int]:
        """Of prompt and answer as they are billed: the backend's count where it gives one, ours otherwise.

        Of what broke off the larger is billed, and of a count that cannot be true no more than was reserved.
        """
        reserved = self.reserved_output.get(self.served.name, 0) if self.served is not None else 0
        most = self.possible or (None, None)
        return (
            self._billed(self.own_input, self.backend_input, most[0], self.own_input),
            self._billed(self.own_output, self.backend_output, most[1], reserved),
        )

    def _billed(self, own: int, told: int | None, most: int | None, reserved: int) -> int:
        if told is None:
            return own
        if most is not None and told > most:
            told = min(told, reserved)
        return max(own, told) if self.ended in CUT else told

    def is_lied_to(self) -> bool:
        """Whether the backend counts more tokens than there can be."""
        told = self.backend_input or 0, self.backend_output or 0
        return self.possible is not None and (told[0] > self.possible[0] or told[1] > self.possible[1])

    def end(self) -> None:
        """Set what it took and cost."""
        self.latency = self.elapsed()
        self.cost = 0
        if self.served is not None and self.ended in BILLED:
            self.cost = min(price(self.served, *self.tokens()), LARGEST)


def valid(text: str) -> str:
    """A text that UTF-8 can hold: half surrogates become question marks."""
    return text.encode("utf-8", "replace").decode()


def price(model: Model, input_tokens: int, output_tokens: int) -> int:
    """Picodollars of so many tokens."""
    assert model.input_price is not None
    assert model.output_price is not None
    a_token = PICO / 1e6
    return input_tokens * round(model.input_price * a_token) + output_tokens * round(model.output_price * a_token)
