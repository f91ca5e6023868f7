"""One frame per forward of the base model: what routers may see, and what they recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.host.memory import Memory
from moesaic.host.paged import Paged
from moesaic.host.prompts import Prompt
from moesaic.routing import Record, TokenSums

Past = int | Tensor
"""A number of tokens: of a compiled forward perhaps a tensor ()."""


@dataclass
class StackView:
    """Mask and sequence index of the tokens that run through one stack, both (batch, tokens) or None; tokens a row."""

    mask: Tensor | None = None
    sequences: Tensor | None = None
    tokens: int | None = None
    prompt: Tensor | None = None
    """(batch, tokens), True on the tokens that are given, where the stack's differ from the model's: a decoder's."""
    cached: bool = False
    """Whether its tokens are those of the forward's KV cache."""
    past: Past = 0
    """Tokens a row that are in the KV cache already."""
    seen: Tensor | None = None
    """Which of those and of its own tokens are real (batch, past + tokens); None if all are."""
    placed: dict[torch.device, StackView] = field(default_factory=dict)

    def on(self, device: torch.device) -> StackView:
        """The same where a layer lies, once a device: layers on one must share a mask for their losses to stack."""
        if device not in self.placed:
            mask, sequences, prompt, seen = (
                None if values is None else values.to(device)
                for values in (self.mask, self.sequences, self.prompt, self.seen)
            )
            self.placed[device] = replace(self, mask=mask, sequences=sequences, prompt=prompt, seen=seen, placed={})
        return self.placed[device]

    def widened(self, rows: int, tokens: int, given: int) -> StackView:
        """Of all that the cache holds, for a module that reads it anew in every step.

        Args:
            tokens: as many as the cache has room for, behind what was seen.
            given: how many of them are the prompt's.
        """
        length = self.past + (self.tokens or 0)
        places = torch.arange(tokens, device=None if self.seen is None else self.seen.device)
        real = (places < length).expand(rows, -1)
        if self.seen is not None:
            real = real & torch.nn.functional.pad(self.seen, (0, tokens - self.seen.shape[1]))
        return StackView(mask=real, tokens=tokens, prompt=real & (places < given))


@dataclass
class Frame:
    """All that belongs to one forward of the base model (or of one stack called on its own).

    Layers write into `records`; a layer that is recomputed by checkpointing finds the frame of *its* forward again,
    because the frame is bound to the checkpoint when it is made.
    """

    training: bool = False
    grad: bool = False
    stack: str | None = None
    """The stack that was called on its own, for which the frame is; None for a forward of the model."""
    complete: bool = False
    """A full forward over the whole model: not one stack alone, not a decoding step."""
    share: Tensor | float = 1.0
    """This micro-batch's part of the optimiser step, for loops that divide by `num_items_in_batch`."""
    labelled: bool = False
    task_ids: Tensor | None = None
    targets: Tensor | None = None
    scores: Tensor | None = None
    prompt: Tensor | None = None
    """(batch, tokens), True on tokens that are given: without a label, or known to be no answers; None if all are."""
    tokens: int | None = None
    """Tokens a row that the model was called with."""
    answering: bool = False
    """Whether all of its tokens are known to be answers."""
    parts: Tensor | None = None
    """How many of a sequence's tokens stand for images or sound (batch,), where the model was given some."""
    paged: Paged | None = None
    """Continuous batching's requests, where they lie flat in one row."""
    stacks: dict[str, StackView] = field(default_factory=dict)
    records: dict[tuple[str, str, int], Record] = field(default_factory=dict)
    """By module, adapter, and how often the module ran before: some models run one several times."""
    pooled: tuple[Tensor, Tensor] | None = None
    """The last layer input that was pooled, and its sequence means: neighbours share their input."""
    cast: tuple[Tensor, int, bool, Tensor] | None = None
    """The last layer input that was cast to float32, its version, whether with gradients, and itself in float32."""
    called: set[str] = field(default_factory=set)
    neighbours: Mapping[Any, Sequence[Any]] = field(default_factory=dict)
    """By linear, all that are expected to read what it reads."""
    state: dict[Any, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    """What the routers keep on the forward's KV cache."""
    told: Prompt | None = None
    keeps: bool = False
    """Whether it does: not in training, where nothing is read again."""
    sums: TokenSums = field(default_factory=TokenSums)

    def release(self) -> None:
        """Let go of what only the forward needed: checkpointing keeps the frame until the backward."""
        self.records, self.pooled, self.cast = {}, None, None
