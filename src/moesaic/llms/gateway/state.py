"""What a gateway goes by at one moment: a file's models, keys and routers. A reload puts another in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.errors import ConfigError
from moesaic.llms.catalog import OWN, Model
from moesaic.llms.gateway.asker import Asker
from moesaic.llms.gateway.config import Config, is_loopback
from moesaic.llms.gateway.gate import LOOPBACK, Gate
from moesaic.llms.gateway.keys import Guesses, Keys
from moesaic.llms.gateway.policy import Breaker
from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.relay import Relay
from moesaic.llms.gateway.replies import Backend
from moesaic.llms.gateway.requests import Asked
from moesaic.llms.gateway.routers import Router, open_router
from moesaic.llms.gateway.tokens import Counter


@dataclass(frozen=True)
class State:
    """One configuration, ready to be asked.

    Attributes:
        routers: by the name that requests use.
    """

    config: Config
    gate: Gate
    routers: Mapping[str, Router | Asker]
    relay: Relay
    counter: Counter

    def model(self, name: str) -> Model:
        """The model of a request. Raises Refused for one that there is not, or that answers nothing."""
        try:
            model = self.config.catalog.resolve(name)
        except ConfigError:
            raise self.unknown(name) from None
        if not model.endpoint:
            raise self.unknown(name)
        return model

    def answers(self, model: str) -> bool:
        """Whether there is such a model, which answers."""
        return model in self.config.catalog and bool(self.config.catalog[model].endpoint)

    def router(self, name: str) -> Router | Asker:
        if name not in self.routers:
            raise self.unknown(name)
        return self.routers[name]

    def unknown(self, name: str) -> Refused:
        shown = "".join(char for char in name[:80] if char.isprintable())
        return Refused(404, f"no model {shown!r}: GET /v1/models lists those there are", code="model_not_found")

    def candidates(self, model: Model, *, routed: bool) -> list[Model]:
        """Who may answer: the model, then its fallbacks."""
        after = self.config.after(model.name, routed=routed)
        return [model, *(self.config.catalog[name] for name in after)]

    def names(self) -> list[str]:
        """What a request may ask for: routers, models and their aliases."""
        models = [model for model in self.config.catalog.values() if model.endpoint]
        return [*self.routers, *(name for model in models for name in (model.name, *model.aliases))]

    def count(self, model: Model, asked: Asked) -> int:
        """Tokens of a prompt by our count."""
        return self.counter.count(model.name, asked.texts) + asked.overhead

    def reserved_output(self, asked: Asked, model: Model) -> int:
        """Tokens of an answer at most, as far as they can be known."""
        most = self.config.settings.reserve_output if asked.most is None else asked.most
        return asked.answers(most if model.context is None else min(most, model.context))


def make_state(
    config: Config,
    backends: Mapping[str, Backend],
    before: State | None,
    guesses: Guesses,
    routers: Mapping[str, Router | Asker] | None = None,
) -> State:
    """A state. Reads routers' folders and tokenizers, so it takes a while.

    Args:
        before: models whose policy has not changed keep their breakers, and routers that are policies may be kept.
        routers: in place of those that the file names.

    Raises:
        ConfigError, MissingDependency: something cannot be had.
    """
    hosts = LOOPBACK | {config.settings.host.encode()} if is_loopback(config.settings.host) else frozenset[bytes]()
    if routers is None:
        there = before.routers if before is not None else {}
        routers = {
            OWN + name: open_router(name, folder, config.catalog, there.get(OWN + name))
            for name, folder in config.routers.items()
        }
    breakers = {}
    for name, policy in config.policies.items():
        held = before.relay.breakers.get(name) if before is not None else None
        breakers[name] = held if held is not None and held.policy == policy else Breaker(policy)
    counter = Counter(config.tokenizers)
    relay = Relay(backends, breakers, counter, config.settings.largest_answer)
    return State(config, Gate(Keys(config.keys), hosts, guesses), routers, relay, counter)
