"""Read-ME: experts cut out of a dense LLM by domain, and one router before it (Cai et al., NeurIPS 2024, 2410.19123).

    s_i^l[c] = mean over a domain's tokens of |a^l_c(x)|       a^l(x): what a layer's last linear reads, (T, d_ff)
    m_i^l    = the d neurons with the highest s_i^l            experts may share neurons, and leave some to none
    r^l      = prod_i m_i^l,   e_i^l = m_i^l - r^l             the permanent part, and what is an expert's own
    y_t      = (a^l(x_t) * (r^l + e^l_{z_t})) Wd^T             z_t = argmax_i G(x_<=t)_i: the same in every layer

The router G sees token ids alone (`pregate.py`), so that a token's experts are known in all layers before any runs.
No gate multiplies the output. Masks take exactly d neurons; the authors' code takes one less, by a strict comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.ffn.layer import ExpertLayer, bank_of
from moesaic.ffn.masks import Masks, masks, scores, shared
from moesaic.ffn.method import Method, setting
from moesaic.ffn.places import expert_layers, put, sites
from moesaic.ffn.pregate import PreGate
from moesaic.ffn.serving.files import write_checksums
from moesaic.ffn.split import Seat, cut, read, seats
from moesaic.ffn.tune import Rounds, tune
from moesaic.ffn.watching import Text, batches_of
from moesaic.host import Host
from moesaic.host import masks as token_masks
from moesaic.host.paged import is_paged
from moesaic.routing import Router, RoutingContext, Site, TopK

ROUTES = "read-me routes"
"""Where the running forward's logits (B, T, N) are in the routing context's state."""
PAST = "read-me keys", "read-me values"
"""Where the router's keys and values are in its memory: tensors (B, P, p), which follow the rows of the cache."""
REAL = "read-me real"
"""And which of those tokens are no padding, (B, P)."""

_BANK: ContextVar[Callable[..., Any] | None] = ContextVar("bank", default=None)


@contextmanager
def banks_of(kind: Callable[..., Any]) -> Iterator[None]:
    """Models that are made inside have banks of this kind; neurons that all experts share stay as they are."""
    token = _BANK.set(kind)
    try:
        yield
    finally:
        _BANK.reset(token)


class PreGated(Router):
    """No parameters: the logits that were made of the tokens before the model ran."""

    def score(self, h: Tensor, context: RoutingContext | None = None) -> Tensor:
        if context is None or ROUTES not in context.state:
            raise ConfigError(
                "the experts of a Read-ME model are chosen by its token ids: call the whole model with input_ids"
            )
        logits = cast(Tensor, context.state[ROUTES])
        return logits.view(*h.shape[:-1], -1)


def route(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model runs: every token's logits into the frame, the router's keys and values onto the KV cache."""
    frame = model.host.frame
    if frame is not None and (known := getattr(model, "known_routes", None)) is not None:
        frame.state[ROUTES] = known
        return
    arguments = token_masks.bind(model, args, kwargs)
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if frame is None or not isinstance(ids, Tensor):
        return
    if is_paged(arguments):
        raise ConfigError(
            "generate_batch keeps no keys and values for Read-ME's router: moesaic.ffn.serving.engine has continuous "
            "batches for these models"
        )
    memory: MutableMapping[Any, Any] = frame.memory
    start = frame.memory.past
    past = tuple(memory[name][:, :start] for name in PAST) if start and PAST[0] in memory else None
    packed = token_masks.packed_sequences(arguments, training=frame.training and frame.grad)
    real = token_masks.two_d(mask, ids.shape[1], start)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.expand_as(ids)
    if past is not None:
        real = torch.cat([memory[REAL][:, :start], real], dim=1)
    frame.state[ROUTES], kept = model.pre_gate(ids, real, past, packed if past is None else None)
    if frame.keeps:
        memory.update(zip((*PAST, REAL), (*kept, real), strict=True))


@dataclass
class ReadMe(Method):
    """An expert of each feed-forward layer for every domain of text, of the same model: Llama, Qwen, Mistral, GPT-2 …

        method = ReadMe(["code", "prose"])
        convert(model, method, **method.parts(model, {"code": ids, "prose": others}))     # rows (n, T) of token ids

    `tune.tune` trains masks and router before that. `domains` are the experts' names, in their order; `shared_widths`,
    how many neurons all experts of a layer share, follows from the masks. Raises ConfigError for settings that cannot
    be. Cai et al. 2024, arXiv 2410.19123.
    """

    name: ClassVar[str] = "read-me"
    summary: ClassVar[str] = "an expert for each domain of text, and one router before the model runs"
    paper: ClassVar[str] = "Read-ME (NeurIPS 2024, arXiv 2410.19123)"
    takes: ClassVar[tuple[str, ...]] = ("masks", "pre_gate")
    training: ClassVar[type | None] = Rounds
    slims: ClassVar[bool] = False

    domains: list[str]
    width: int = setting(0, "d, neurons of one expert; half of the layers' own where left out")
    residual: Literal["fused", "separate"] = setting(
        "fused", "fused: each expert holds the neurons that all share; separate: they are a layer of their own"
    )
    shared_widths: list[int] = field(default_factory=list)
    router_dim: int = setting(0, "width of the router before the model; the model's own, at most 512, where left out")
    router_heads: int = setting(4, "of its attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.domains) < 2 or len(set(self.domains)) < len(self.domains):
            raise ConfigError(
                f"Read-ME needs two domains at least, of different names: {', '.join(self.domains) or 'none'}"
            )
        if self.width < 0 or self.router_dim < 0 or self.router_heads < 1:
            raise ConfigError(
                f"width={self.width}, router_dim={self.router_dim}, router_heads={self.router_heads}: not below 0"
            )

    def layer(self, model: PreTrainedModel, seat: Seat, site: Site, host: Host, common: int) -> ExpertLayer:
        dense = read(model, seat)
        stock = bank_of(seat)
        bank, apart = _BANK.get() or stock, common if self.residual == "separate" else 0
        made = ExpertLayer(
            site,
            PreGated(len(self.domains)),
            TopK(1),
            bank(model.config, len(self.domains), seat.d_model, self.width - apart, dense.activation),
            host,
            bias=dense.bias,
            combine="sum",
            shared=stock(model.config, 1, seat.d_model, apart, dense.activation) if apart else None,
        )
        return made.to(dense.up.device, dense.up.dtype).train(model.training)

    def install(self, model: PreTrainedModel, host: Host) -> None:
        found = sites(model)
        for (seat, site), common in zip(found, self.shared_widths or [0] * len(found), strict=True):
            put(model, seat, self.layer(model, seat, site, host, common))
        vocab = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        model.pre_gate = PreGate(vocab, len(self.domains), dim=self.router_dim, heads=self.router_heads)

    def parts(self, model: PreTrainedModel, text: Text, *, batch_size: int = 8, seed: int = 0) -> dict[str, Any]:
        """Masks of the model as it is, and a router that knows nothing yet but the model's embedding."""
        if text.keys() != {*self.domains}:
            raise ConfigError(f"text is of {', '.join(text)}, and the domains are {', '.join(self.domains)}")
        table = cast(nn.Embedding, model.get_input_embeddings())
        even = 2 * self.router_heads
        dim = self.router_dim or max(even, min(512, table.embedding_dim) // even * even)
        width = self.width or min(seat.d_ff for seat in seats(model)) // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            router = PreGate(table.num_embeddings, len(self.domains), dim=dim, heads=self.router_heads)
        router.take_embedding(table.weight)
        found = scores(model, {name: batches_of(text[name], batch_size) for name in self.domains})
        return {"masks": masks(found, width), "pre_gate": router.to(model.device)}

    def tune(
        self, model: PreTrainedModel, parts: dict[str, Any], batches: Any, settings: Any, **how: Any
    ) -> Iterator[int]:
        return tune(model, parts["pre_gate"], parts["masks"], batches, settings, **how)

    def written(self, folder: Path, model: PreTrainedModel) -> None:
        """Checksums of the experts beside them, by which the engine notices damage."""
        write_checksums(folder, [f"{name}.experts" for name in expert_layers(model)])

    def convert(self, model: PreTrainedModel, host: Host, *, masks: Masks, pre_gate: PreGate) -> None:  # type: ignore[override]
        found = sites(model)
        self.width = self.width or int(next(iter(masks.values())).sum(dim=1)[0])
        self._check_masks(masks, [seat for seat, _ in found])
        vocab = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        if (pre_gate.num_experts, pre_gate.embedding.num_embeddings) != (len(self.domains), vocab):
            raise ConfigError(
                f"pre_gate routes {pre_gate.embedding.num_embeddings:,} tokens to {pre_gate.num_experts} experts: the "
                f"model has {vocab:,}, and there are {len(self.domains)} domains"
            )
        self.router_dim, self.router_heads = pre_gate.dim, pre_gate.heads
        self.shared_widths = [int(shared(masks[seat.name]).sum()) for seat, _ in found]
        made = []
        for (seat, site), common in zip(found, self.shared_widths, strict=True):
            layer, dense, mask = self.layer(model, seat, site, host, common), read(model, seat), masks[seat.name]
            if layer.shared is not None:
                layer.shared.fill(cut(dense, shared(mask).nonzero().view(1, -1)))
                mask = mask & ~shared(mask)
            layer.experts.fill(cut(dense, torch.stack([row.nonzero().flatten() for row in mask])))
            made.append((seat, layer))
        for seat, layer in made:
            put(model, seat, layer)
        model.pre_gate = pre_gate

    def _check_masks(self, found: Masks, places: list[Seat]) -> None:
        """Raise ConfigError for masks of another model, other domains, or another width."""
        if found.keys() != {seat.name for seat in places}:
            raise ConfigError("masks are of another model: its feed-forward layers go by other names")
        for seat in places:
            mask = found[seat.name]
            if mask.shape != (len(self.domains), seat.d_ff) or bool((mask.sum(dim=1) != self.width).any()):
                raise ConfigError(
                    f"the mask of {seat.name} must be of {len(self.domains)} domains and {seat.d_ff} neurons, "
                    f"{self.width} of them in each"
                )

    @classmethod
    def resized(cls, model: Any) -> None:
        model.pre_gate.resize(model.get_input_embeddings().weight)

    def attached(self, model: Any) -> None:
        model.register_forward_pre_hook(route, with_kwargs=True)
