"""What a mixture costs on paper: multiplications and bytes a token, from the shapes of a base's linears alone.

    base     2 sum d_in d_out                                       FLOPs a token, forward
    LoRA     2 sum R (d_in + d_out)                                 of rank R
    mixture  2 sum E r (d_in + d_out) + E d_in                      rank space: every expert, and the router
             2 sum k r (d_in + d_out) + E d_in                      those that are routed to alone

A byte count is that of the same weights, each read once: what a step of decoding has to bring in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """A decoder of Llama's shape.

    Attributes:
        kv: width of the keys. ffn: of the FFN's activations. vocabulary: whose map to logits is read in decoding too.
    """

    name: str
    layers: int
    d: int
    kv: int
    ffn: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of a layer's seven."""
        d, kv, ffn = self.d, self.kv, self.ffn
        return [(d, d), (d, kv), (d, kv), (d, d), (d, ffn), (d, ffn), (ffn, d)]

    @property
    def weights(self) -> int:
        """Of all layers' linears."""
        return self.layers * sum(i * o for i, o in self.linears)

    def lora(self, rank: int) -> int:
        """Weights of a plain LoRA on all linears."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears)

    def routers(self, experts: int) -> int:
        """Weights of a linear router for each linear."""
        return self.layers * sum(experts * i for i, _ in self.linears)

    def mixture(self, experts: int, r: int, active: int | None = None) -> int:
        """Weights that a token's mixture multiplies by: all experts', or those of the `active` ones; and routers'."""
        return self.lora(r * (experts if active is None else active)) + self.routers(experts)

    def read(self) -> int:
        """Weights that a step of decoding reads of the base alone."""
        return self.weights + self.vocabulary * self.d


BASES = (Base("8B", 32, 4096, 1024, 14336, 128256), Base("70B", 80, 8192, 1024, 28672, 128256))
"""Llama 3's."""


def flops(weights: int) -> int:
    """A token's, forward, of so many weights."""
    return 2 * weights
