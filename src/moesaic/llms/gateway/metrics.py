"""Counts for Prometheus, in its text format. Labels are models, paths, statuses and keys' ids; never a key."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from moesaic.llms.gateway.calls import BILLED, PICO, Call, valid
from moesaic.llms.gateway.policy import Breaker

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STATES = {"closed": 0, "half-open": 1, "open": 2}
_HELP = {
    "requests_total": ("counter", "Calls that ended, by model, path, status and how they ended."),
    "refused_total": ("counter", "Requests that were turned away, by status and code."),
    "tokens_total": ("counter", "Tokens as they were billed, by model and direction."),
    "cost_usd_total": ("counter", "USD that were billed, by model and key id."),
    "attempts_total": ("counter", "Tries of models, by model and whether they answered."),
    "routed_total": ("counter", "Decisions, by router, category and expert."),
    "in_flight": ("gauge", "Calls that run."),
    "breaker_state": ("gauge", "0 closed, 1 half-open, 2 open."),
    "latency_seconds": ("histogram", "Seconds from a request's head to the end of its answer, by model."),
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What has been counted since the gateway began."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Labels]] = {name: Counter() for name in _HELP}
        self._times: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self.running = 0

    def ended(self, call: Call) -> None:
        model, counts = call.served.name if call.served else "", self._counts
        served = ("model", model)
        ended = served, ("path", call.path), ("status", str(call.status)), ("ended", call.ended)
        counts["requests_total"][ended] += 1
        for attempt in call.attempts:
            if attempt["ms"] is None:
                continue
            answered = "true" if attempt["said"] == "ok" else "false"
            counts["attempts_total"][("model", attempt["model"]), ("answered", answered)] += 1
        if call.router:
            routed = ("router", call.router), ("category", call.category), ("expert", call.expert)
            counts["routed_total"][routed] += 1
        if call.served is None:
            return
        input_tokens, output_tokens = call.tokens() if call.ended in BILLED else (0, 0)
        counts["tokens_total"][served, ("direction", "input")] += input_tokens
        counts["tokens_total"][served, ("direction", "output")] += output_tokens
        counts["cost_usd_total"][served, ("key", call.key)] += call.cost
        self._times.setdefault(model, [0] * (len(EDGES) + 1))[bisect_left(EDGES, call.latency)] += 1
        self._seconds[model] = self._seconds.get(model, 0.0) + call.latency

    def refused(self, status: int, code: str | None) -> None:
        self._counts["refused_total"][("status", str(status)), ("code", code or "")] += 1

    def text(self, breakers: Mapping[str, Breaker]) -> str:
        """All of it, as Prometheus reads it."""
        lines: list[str] = []
        for name, (kind, help_) in _HELP.items():
            lines += [f"# HELP moesaic_{name} {help_}", f"# TYPE moesaic_{name} {kind}"]
            lines += self._samples(name, breakers)
        return "\n".join(lines) + "\n"

    def _samples(self, name: str, breakers: Mapping[str, Breaker]) -> Iterable[str]:
        if name == "in_flight":
            yield f"moesaic_in_flight {self.running}"
        elif name == "breaker_state":
            for model, breaker in breakers.items():
                yield _sample(name, (("model", model),), _STATES[breaker.state])
        elif name == "latency_seconds":
            for model, counts in self._times.items():
                yield from self._histogram(name, model, counts)
        else:
            unit = PICO if name == "cost_usd_total" else 1
            for labels, count in self._counts[name].items():
                yield _sample(name, labels, count / unit if unit > 1 else count)

    def _histogram(self, name: str, model: str, counts: list[int]) -> Iterable[str]:
        total = 0
        for edge, count in zip((*map(str, EDGES), "+Inf"), counts, strict=True):
            total += count
            yield _sample(name + "_bucket", (("model", model), ("le", edge)), total)
        yield _sample(name + "_sum", (("model", model),), self._seconds[model])
        yield _sample(name + "_count", (("model", model),), total)


def _sample(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"moesaic_{name}{{{shown}}} {value}"


def _escaped(text: str) -> str:
    return valid(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
