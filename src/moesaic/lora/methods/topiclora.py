"""TopicLoRA: experts placed in a graph of topics, routing drawn towards a prompt's topics.

Only the paper's abstract is public: three stages (a prior graph of BIG-bench topics whose embeddings part the experts;
the relevance of a prompt to topics; routing aligned with it by KL). The equations below are OUR RECONSTRUCTION, and so
are all sizes and weights: nothing here reproduces the paper's figures. docs/topiclora.md tells the whole.

    stage 1   topic graph -> GCN -> prototypes C (E, dg), assignment P (topics, E)           topics/graph.py
    stage 2   g = 0.95 softmax(s / 0.07) P + 0.05 / E,  s a prompt's cosines with the topics   topics/artefact.py
    stage 3   p = softmax(n(W_r h) C^T / tau),  n: unit rows, C frozen                         (..., E)
              weights = top-k(p) / sum of the kept
              loss = lambda_kl KL(g || pbar), mean over routers and sequences;  pbar: mean of p over prompt tokens

lambda_kl is `aux_weight`; it rises from 0 over the first tenth of the training. Prototypes come from stage 1 when the
first router is made and are then kept in the config and saved with every router: a saved adapter needs neither the
encoder nor the graph. Targets reach the loss as `routing_targets` of the batch; `moesaic train` puts them there.

Departures: none can be told, since no code is public.
"""

from __future__ import annotations

import base64
import binascii
import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.lora.config import MixtureConfig
from moesaic.lora.kind import Kind
from moesaic.lora.methods.topics.artefact import Topics, build
from moesaic.lora.methods.topics.settings import PACKAGED, TopicSettings
from moesaic.routing import (
    AuxiliaryLoss,
    Gate,
    Joint,
    LinearRouter,
    Record,
    Router,
    RoutingContext,
    Site,
    Softmax,
    SwitchBalance,
    TopK,
    by_router,
)
from moesaic.routing.losses import Reduce, stacks

Direction = Literal["forward", "reverse", "js"]
Tokens = Literal["prompt", "all"]

INIT_STD = 0.02
TINY = 1e-12


class PrototypeRouter(Router):
    """`logits = n(W_r h) C^T / tau`: cosines with frozen prototypes, one an expert."""

    shared = ("read.weight", "log_temperature")
    log_temperature: Tensor

    def __init__(self, d_in: int, prototypes: Tensor, *, temperature: float = 0.1, learn: bool = False) -> None:
        """`prototypes` (E, dg) must have unit rows; `learn` makes the temperature a parameter."""
        super().__init__(len(prototypes))
        self.read = nn.Linear(d_in, prototypes.shape[1], bias=False, dtype=torch.float32)
        nn.init.normal_(self.read.weight, std=INIT_STD)
        self.prototypes: Tensor
        self.keep("prototypes", prototypes.clone())
        self.temperature = temperature
        if learn:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), dtype=torch.float32))
        self.learn = learn

    def projection(self, context: RoutingContext | None = None) -> tuple[Tensor, Tensor | None]:
        return self.read.weight, None

    def from_projection(self, read: Tensor, context: RoutingContext | None = None) -> Tensor:
        cosines = F.linear(F.normalize(read, dim=-1, eps=1e-6), self.prototypes.to(read.dtype))
        return cosines * torch.exp(-self.log_temperature.to(read.dtype)) if self.learn else cosines / self.temperature

    @classmethod
    def from_projections(cls, routers: Sequence[Self], read: Tensor, joint: Joint) -> Tensor:
        if "prototypes" not in joint.kept:
            sharpened = [r.prototypes / (r.log_temperature.exp() if r.learn else r.temperature) for r in routers]
            joint.kept["prototypes"] = torch.stack(sharpened).to(read.dtype).transpose(1, 2)
        return by_router(F.normalize(read, dim=-1, eps=1e-6), joint.kept["prototypes"])

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}"


class TopicAlignment(AuxiliaryLoss):
    """`D(g, pbar)`, averaged over sequences: g (batch, E) the targets, pbar the mean dense probabilities over tokens.

    `direction`: forward KL(g || pbar) covers all of g's mass; reverse KL(pbar || g); js, the mean of both against their
    middle. `tokens`: those of the prompt (all real ones where a row, or the batch, has no prompt), or all real ones.
    An input without a sequence axis counts each token as a sequence. The loss rises from 0 while `progress` is below
    `warmup`. No gradient reaches g. Without targets it is 0, and says so once.
    """

    def __init__(
        self,
        weight: float,
        *,
        direction: Direction = "forward",
        tokens: Tokens = "prompt",
        warmup: float = 0.0,
        reduce: Reduce = "mean",
    ) -> None:
        super().__init__(weight, reduce=reduce)
        self.direction = direction
        self.tokens = tokens
        self.warmup = warmup
        self._warned = False

    def per_router(self, records: Sequence[Record], step: Hashable) -> Iterator[Tensor]:
        for stack in stacks(records, "probs"):
            first, probs = stack.records[0], stack.values
            if first.targets is None:
                self._warn()
                yield probs.new_zeros(len(probs))
                continue
            rows = first.routing.probs.shape[0]
            probs = probs.unflatten(1, (rows, -1))
            counted = self.counted(first, probs)
            share = counted / counted.sum(dim=1, keepdim=True).clamp(min=1)
            target = _targets(first.targets, probs)
            distance = divergence(target, torch.einsum("rnte,nt->rne", probs, share), self.direction)
            real = counted.any(dim=1).to(probs.dtype)
            warm = min(1.0, first.progress / self.warmup) if self.warmup > 0 else 1.0
            yield warm * (distance @ real) / real.sum().clamp(min=1)

    def counted(self, record: Record, probs: Tensor) -> Tensor:
        """1 where a token takes part in pbar, (rows, tokens) of probs (R, rows, tokens, E)."""
        rows, tokens = probs.shape[1:3]
        real = probs.new_ones(rows, tokens) if record.mask is None else record.mask.view(rows, tokens).to(probs.dtype)
        if self.tokens == "all" or record.prompt is None:
            return real
        return record.prompt.view(rows, tokens).to(probs.dtype)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "TopicLoRA's KL term is 0: the batch has no routing_targets. `moesaic train` adds them; in a loop of "
                "your own put config.targets(prompts) (rows, E) into the batch, or set aux_weight=0",
                stacklevel=2,
            )


def divergence(target: Tensor, probs: Tensor, direction: Direction = "forward") -> Tensor:
    """Distance over the last axis, in nats, >= 0 and 0 where both are equal; logs are clamped, so it is finite."""
    if direction == "forward":
        return _kl(target, probs)
    if direction == "reverse":
        return _kl(probs, target)
    middle = (target + probs) / 2
    return (_kl(target, middle) + _kl(probs, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log())).sum(dim=-1)


def _targets(targets: Tensor, probs: Tensor) -> Tensor:
    """Detached and in `probs`' dtype. Raises ConfigError unless they fit probs (R, rows, tokens, E)."""
    rows, num_experts = probs.shape[1], probs.shape[3]
    if targets.shape != (rows, num_experts):
        raise ConfigError(
            f"routing_targets is {tuple(targets.shape)} for {rows} rows and num_experts={num_experts}: give one row of "
            "num_experts shares a sequence (packed sequences cannot be told apart)"
        )
    return targets.detach().to(probs)


@dataclass
class TopicLoRAConfig(MixtureConfig):
    """Settings of TopicLoRA on top of `MixtureConfig`'s."""

    method: ClassVar[str] = "topiclora"
    paper: ClassVar[str] = "TopicLoRA (abstract only; our reconstruction)"
    summary: ClassVar[str] = "experts placed in a graph of topics, routing drawn towards a prompt's topics"
    kind: ClassVar[Kind] = Kind(needs_targets=True)

    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the experts' input"})
    top_k: int | None = field(default=2, metadata={"help": "experts a token; null mixes all of them"})
    topics: str = field(
        default="bigbench", metadata={"help": "bigbench, or a file of `moesaic topics build` with your own topics"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "encodes topics and prompts: minilm where left out; a topics file has its own"}
    )
    topics_seed: int = field(default=0, metadata={"help": "of the graph's embedding, with topics=bigbench"})
    topic_dim: int = field(default=64, metadata={"help": "size dg of a prototype"})
    prototype_router: bool = field(
        default=True, metadata={"help": "route by the prototypes; false: a plain linear router (ablation)"}
    )
    router_temperature: float = field(default=0.1, metadata={"help": "tau: cosines are divided by it"})
    learn_temperature: bool = field(default=False, metadata={"help": "train tau, one a router"})
    aux_weight: float = field(default=0.1, metadata={"help": "lambda_kl, weight of the KL term; 0 turns it off"})
    kl_direction: Direction = field(default="forward", metadata={"help": "forward KL(g||pbar), reverse, or js"})
    kl_tokens: Tokens = field(default="prompt", metadata={"help": "tokens in pbar: prompt, or all"})
    kl_warmup: float = field(default=0.1, metadata={"help": "share of the training over which the KL term rises"})
    aux_reduce: Reduce = field(default="mean", metadata={"help": "mean or sum over routers"})
    balance_weight: float = field(
        default=0.0, metadata={"help": "weight of a Switch balance loss beside the KL term, times aux_weight"}
    )
    prototypes: str | None = field(
        default=None, repr=False, metadata={"help": "filled in from topics and saved: base64 of float32 (E, topic_dim)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.topics:
            raise ConfigError("topics is empty: it must be 'bigbench' or the path of a topics file")
        if self.topic_dim < 1:
            raise ConfigError(f"topic_dim={self.topic_dim} must be at least 1")
        if self.router_temperature <= 0:
            raise ConfigError(f"router_temperature={self.router_temperature} must be above 0")
        if not 0 <= self.kl_warmup <= 1:
            raise ConfigError(f"kl_warmup={self.kl_warmup} must be between 0 and 1")
        if self.balance_weight < 0 or (self.balance_weight > 0 and self.aux_weight == 0):
            raise ConfigError(f"balance_weight={self.balance_weight} must be at least 0, and needs aux_weight above 0")

    @property
    def files(self) -> list[str]:
        return [] if self.topics == PACKAGED else [self.topics]

    def made_topics(self) -> Topics:
        """Stage 1's result: read from the file `topics` names, or built (about a second, once a process).

        Raises:
            ConfigError: it does not fit num_experts, topic_dim or encoder.
        """
        if self.topics == PACKAGED:
            return _packaged(self.encoder or "minilm", self.num_experts, self.topic_dim, self.topics_seed)
        made = Topics.load(self.topics)
        if made.prototypes.shape != (self.num_experts, self.topic_dim):
            experts, size = made.prototypes.shape
            raise ConfigError(
                f"{self.topics} has {experts} experts of size {size}, but num_experts={self.num_experts} and "
                f"topic_dim={self.topic_dim}: set these to it, or build it anew"
            )
        if self.encoder not in (None, made.settings.encoder):
            raise ConfigError(
                f"encoder={self.encoder}, but {self.topics} was made with {made.settings.encoder}: leave encoder out"
            )
        return made

    def expert_prototypes(self) -> Tensor:
        """C (E, topic_dim), unit rows: those kept in the config, else taken from stage 1 and kept there.

        Raises:
            ConfigError: what is kept does not fit num_experts and topic_dim.
        """
        if self.prototypes is None:
            made = self.made_topics().prototypes
            self.prototypes = base64.b64encode(made.numpy().astype("<f4").tobytes()).decode()
            return made
        try:
            numbers = torch.frombuffer(bytearray(base64.b64decode(self.prototypes, validate=True)), dtype=torch.float32)
            return numbers.view(self.num_experts, self.topic_dim)
        except (binascii.Error, ValueError, TypeError, RuntimeError):
            raise ConfigError(
                f"prototypes do not hold num_experts={self.num_experts} times topic_dim={self.topic_dim} numbers: "
                "leave them out, to have them taken from topics"
            ) from None

    def targets(self, prompts: list[str]) -> Tensor | None:
        """g (N, E) of prompts, without their answers; None with aux_weight=0, which needs none.

        Raises:
            ConfigError: the topics are not those whose prototypes the adapter has.
        """
        if self.aux_weight == 0:
            return None
        made = self.made_topics()
        if self.prototype_router and not torch.allclose(made.prototypes, self.expert_prototypes(), atol=1e-3):
            raise ConfigError(
                f"topics={self.topics} gives other prototypes than this adapter was trained with: name the file it was "
                "trained with (topics=FILE)"
            )
        return made.targets(prompts)

    def router(self, site: Site) -> Router:
        if not self.prototype_router:
            return LinearRouter(site.d_in, self.num_experts)
        prototypes, temperature = self.expert_prototypes(), self.router_temperature
        return PrototypeRouter(site.d_in, prototypes, temperature=temperature, learn=self.learn_temperature)

    def gate(self) -> Gate:
        return Softmax() if self.top_k is None else TopK(self.top_k, normalize="sum")

    def losses(self) -> list[AuxiliaryLoss]:
        alignment = TopicAlignment(
            self.aux_weight,
            direction=self.kl_direction,
            tokens=self.kl_tokens,
            warmup=self.kl_warmup,
            reduce=self.aux_reduce,
        )
        if self.balance_weight == 0:
            return [alignment]
        return [alignment, SwitchBalance(self.aux_weight * self.balance_weight, reduce=self.aux_reduce)]


_built: dict[tuple[Any, ...], Topics] = {}


def _packaged(encoder: str, num_experts: int, topic_dim: int, seed: int) -> Topics:
    """The packaged vocabulary's topics, built once a process."""
    key = (encoder, num_experts, topic_dim, seed)
    if key not in _built:
        settings = TopicSettings(encoder=encoder, num_experts=num_experts, topic_dim=topic_dim, seed=seed)
        _built[key] = build(settings)
    return _built[key]
