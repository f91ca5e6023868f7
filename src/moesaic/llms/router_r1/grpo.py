"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) on transcripts, replies left out.

    A_i = (R_i - mean R) / (std R + 1e-4)                     over the G transcripts of one question
    L = - mean_i  1/|own_i| sum_(t in own_i)  min(r_t A_i, clip(r_t, 1 - ε, 1 + ε) A_i)  +  β KL_t
    r_t = π(t) / π_old(t),   KL_t = π_ref(t) / π(t) - log(π_ref(t) / π(t)) - 1

own_i are the tokens that the policy wrote: those of replies are read, and nothing else. What adapters to TRL give is
held against this loss; Router-R1 itself was trained by PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.llms.router_r1.engine import Rollout

SMALL = 1e-4


@dataclass(frozen=True)
class Episode:
    """A transcript as tokens.

    Attributes:
        prompt, completion: token ids; own: 1 where the policy wrote a token of the completion, 0 in replies.
        logprobs: of the completion's tokens as they were drawn; 0 in replies.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    own: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, rollout: Rollout, prompt: Sequence[int]) -> Episode:
        """Of a rollout whose policy tells its tokens."""
        ids: list[int] = []
        own: list[int] = []
        logs: list[float] = []
        written = iter(rollout.written)
        for piece in rollout.transcript.pieces:
            chances = (0.0,) * len(piece.ids) if piece.reply else next(written).logprobs
            ids += piece.ids
            own += [int(not piece.reply)] * len(piece.ids)
            logs += chances
        return cls(tuple(prompt), tuple(ids), tuple(own), tuple(logs))


def advantages(rewards: Sequence[float], group: int) -> Tensor:
    """A (N,) of N rewards, each `group` of them of one question."""
    table = torch.tensor(rewards, dtype=torch.float32).view(-1, group)
    spread = table.std(dim=1, keepdim=True) if group > 1 else torch.zeros_like(table[:, :1])
    return ((table - table.mean(dim=1, keepdim=True)) / (spread + SMALL)).flatten()


def padded(episodes: Sequence[Episode], pad: int) -> dict[str, Tensor]:
    """Prompts to the left of the middle, completions to the right of it: ids, mask (N, T); own (N, C); columns C."""
    before = max(len(e.prompt) for e in episodes)
    after = max(len(e.completion) for e in episodes)
    ids = torch.full((len(episodes), before + after), pad)
    mask, own = torch.zeros_like(ids), torch.zeros(len(episodes), after, dtype=torch.long)
    for row, e in enumerate(episodes):
        ids[row, before - len(e.prompt) : before] = torch.tensor(e.prompt)
        ids[row, before : before + len(e.completion)] = torch.tensor(e.completion)
        mask[row, before - len(e.prompt) : before + len(e.completion)] = 1
        own[row, : len(e.own)] = torch.tensor(e.own)
    return {"ids": ids, "mask": mask, "own": own}


def log_probabilities(model: Any, ids: Tensor, mask: Tensor, columns: int, temperature: float = 1.0) -> Tensor:
    """Of the last `columns` tokens of each row: (N, C)."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=columns + 1).logits
    logs = (logits[:, :-1] / temperature).log_softmax(-1)
    return logs.gather(-1, ids[:, -columns:, None])[..., 0]


def loss(
    logs: Tensor,
    own: Tensor,
    gain: Tensor,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    beta: float = 0.0,
) -> Tensor:
    """L of log probabilities (N, C), own (N, C) and A (N,).

    Args:
        old: log probabilities under the policy that wrote; those given where None (one step a batch).
        reference: under the policy that it is held to, by `beta`.
    """
    ratio = (logs - (logs.detach() if old is None else old)).exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    each = -torch.min(ratio * gain[:, None], clipped * gain[:, None])
    if beta and reference is not None:
        each = each + beta * ((reference - logs).exp() - (reference - logs) - 1)
    return ((each * own).sum(1) / own.sum(1).clamp(min=1)).mean()
