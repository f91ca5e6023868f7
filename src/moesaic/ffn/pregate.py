"""Read-ME's router: from token ids alone, once, before the backbone runs (Cai et al., NeurIPS 2024, arXiv 2410.19123).

    h = E[ids]                                        (B, T, p), E begins as the first p columns of the LLM's embedding
    h = h + Wo Attn(rms(h))                           causal, with rotary positions
    h = h + W2 silu(W1 rms(h))
    G = Wout rms(h)                                   (B, T, N)

It keeps its own keys and values on the KV cache, so that decoding reads one token a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import ConfigError


class PreGate(nn.Module):
    """Token ids (B, T) to logits (B, T, N).

    Args:
        vocab_size: of the LLM's embedding.
        num_experts: N.
        dim: p; 512 in the paper, less for models that are narrower than that.
        heads: of its attention.
    Raises:
        ConfigError: where `dim` is no multiple of twice the heads.
    """

    def __init__(self, vocab_size: int, num_experts: int, *, dim: int = 512, heads: int = 4) -> None:
        super().__init__()
        if dim % (2 * heads):
            raise ConfigError(f"router_dim={dim} must be a multiple of twice router_heads={heads}")
        self.num_experts, self.dim, self.heads = num_experts, dim, heads
        self.embedding = nn.Embedding(vocab_size, dim)
        self.norm_attention, self.norm_mlp, self.norm_out = (nn.RMSNorm(dim) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, num_experts)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def take_embedding(self, weight: Tensor) -> None:
        """Begin with the first columns of the LLM's embedding (V, d)."""
        width = min(weight.shape[1], self.dim)
        self.embedding.weight[: len(weight), :width] = weight[:, :width].to(self.embedding.weight)

    @torch.no_grad()
    def resize(self, weight: Tensor) -> None:
        """Know as many tokens as the LLM's embedding (V, d): new ones begin as `take_embedding` does."""
        old = self.embedding
        self.embedding = nn.Embedding(len(weight), self.dim).to(old.weight)
        self.take_embedding(weight)
        both = min(len(weight), old.num_embeddings)
        self.embedding.weight[:both] = old.weight[:both]

    def forward(
        self,
        ids: Tensor,
        real: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        sequences: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (B, T, N), and keys and values (B, P + T, p) of all tokens so far.

        Args:
            ids: (B, T).
            real: (B, P + T), False on padding; None if every token is one.
            past: keys and values of the P tokens before.
            sequences: of several that share a row, which one each token belongs to (B, T); with no past.
        """
        h = self.embedding(ids)
        read = self.norm_attention(h)
        key, value = self.key(read), self.value(read)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        h = h + self.out(self._attend(self.query(read), key, value, real, sequences))
        h = h + self.down(F.silu(self.up(self.norm_mlp(h))))
        return self.head(self.norm_out(h)).float(), (key, value)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, sequences: Tensor | None
    ) -> Tensor:
        tokens, total = query.shape[1], key.shape[1]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        places = torch.arange(total, device=q.device)
        q, k = _rotated(q, places[total - tokens :]), _rotated(k, places)
        seen = places <= places[total - tokens :, None]
        if sequences is not None:
            seen = seen & (sequences[:, None, :, None] == sequences[:, None, None, :])
        if real is not None:
            own = torch.eye(total, dtype=torch.bool, device=q.device)[total - tokens :]
            seen = seen & real[:, None, None, :].bool() | own
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions on x (B, heads, T, c)."""
    half = x.shape[-1] // 2
    rates = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = places[:, None] * rates
    cos, sin = (torch.cat([t, t], dim=-1).to(x) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
