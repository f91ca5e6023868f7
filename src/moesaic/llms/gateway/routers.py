"""What the gateway asks which expert is to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moesaic.errors import ConfigError
from moesaic.llms.catalog import OWN, Catalog
from moesaic.llms.gateway.asker import Asker, open_asker
from moesaic.llms.router_r1.folder import is_policy


@dataclass(frozen=True)
class Decision:
    """Who answers a prompt.

    Attributes:
        expert: a model's name. category: what the prompt is about; confidence: that it is, 0 to 1.
        uncertain: the router took the general expert because it was not sure.
        scores: how good each expert would be, 0 to 1, as far as the router says.
    """

    expert: str
    category: str = ""
    confidence: float = 1.0
    uncertain: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)


class Router(Protocol):
    """Decides, in a thread of its own; never two prompts at once."""

    name: str
    """What requests call it: moesaic/…"""

    def decide(self, prompt: str, *, session: str) -> Decision: ...


class Composed:
    """A composition of experts as a router: its expected scores say what a chat would gain by another expert."""

    def __init__(self, name: str, composition: Any, catalog: Catalog, source: Path) -> None:
        self.name, self._composition = name, composition
        for expert in composition.experts:
            if expert not in catalog or not catalog[expert].endpoint:
                raise ConfigError(
                    f"{source}: its expert {expert!r} has no endpoint in the catalog; add it, or fit again"
                )

    def decide(self, prompt: str, *, session: str) -> Decision:
        found = self._composition.decide(prompt)
        return Decision(found.expert, found.category, found.confidence, found.uncertain, found.scores)


def open_router(name: str, folder: Path, catalog: Catalog, held: Router | Asker | None = None) -> Router | Asker:
    """The router that a folder holds: one that decides, or a policy that answers by itself.

    Args:
        held: of the state before, by that name. A policy is kept as long as its folder stays as it is.

    Raises:
        ConfigError: there is none, or one of other models.
    """
    if not folder.is_dir():
        raise ConfigError(f"router {name}: {folder} is no folder; `moesaic llm fit` makes one")
    if is_policy(folder):
        return open_asker(name, folder, catalog, held)
    from moesaic.llms.coe.composition import Composition

    return Composed(OWN + name, Composition.load(folder), catalog, folder)
