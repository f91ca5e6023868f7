"""HotMoE restated from its equations, in the plainest form: a reference for tests, in float64.

Nothing is folded, stacked or shared with the package: token-conditioned experts are a (B, T, E, d) tensor, the gate
fills what it drops with the smallest number, and losses are Python loops over sequences.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.lora import MixtureLinear

F64 = torch.float64


class NaiveRouter(nn.Module):
    """Section "hybrid router": Emb, one LayerNorm over both axes, W_v with bias, W_q and W_k without."""

    def __init__(self, H: int, E: int, d: int, a: int, *, token_expert: bool, k: int | None, tau: float) -> None:
        super().__init__()
        self.E, self.d, self.a, self.k, self.tau = E, d, a, k, tau
        self.emb = nn.Embedding(E, d)
        self.ln = nn.LayerNorm([E, d])
        self.w_v = nn.Linear(H, E)
        self.w_q = nn.Linear(d, a, bias=False)
        self.w_k = nn.Linear(d, a, bias=False)
        self.mlp = nn.Sequential(nn.Linear(H, 4), nn.ReLU(), nn.Linear(4, E * d)) if token_expert else None

    def logits(self, h: Tensor) -> Tensor:
        u = self.w_v(h)
        G = self.ln(self.emb.weight)
        if self.mlp is None:
            S = torch.softmax(self.w_q(G) @ self.w_k(G).T / math.sqrt(self.a), dim=-1)
            return (S @ u.unsqueeze(-1)).squeeze(-1)
        D = self.ln(self.mlp(h).view(*h.shape[:-1], self.E, self.d))
        S = torch.softmax(self.w_q(D) @ self.w_k(G).T / math.sqrt(self.a), dim=-1)
        return (S @ u.unsqueeze(-1)).squeeze(-1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, dense probabilities p and routing weights w, all (B, T, E)."""
        gate = self.logits(h)
        p = torch.softmax(gate, dim=-1)
        if self.k is None:
            return gate, p, p
        chosen = p.topk(self.k, dim=-1).indices
        dropped = torch.full_like(p, torch.finfo(p.dtype).min)
        kept = dropped.scatter(-1, chosen, p.gather(-1, chosen))
        return gate, p, torch.softmax(kept / self.tau, dim=-1)


class NaiveLayer(nn.Module):
    """y = W0 x + b0 + alpha/sqrt(r) * ((A x per expert) * w) B, with the seen (h, p, w) kept in `seen`."""

    def __init__(self, base: nn.Module, router: NaiveRouter, A: Tensor, Bm: Tensor, *, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.router, self.r, self.s = base, router, r, alpha / math.sqrt(r)
        self.A, self.Bm = nn.Parameter(A), nn.Parameter(Bm)
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits, p, w = self.router(x)
        self.seen = (x.detach(), logits, p, w)
        z = (x @ self.A.T).view(*x.shape[:-1], self.router.E, self.r)
        z = (z * w.unsqueeze(-1)).flatten(-2)
        return self.base(x) + self.s * (z @ self.Bm.T)


def restate_router(router: Any, *, k: int | None, tau: float = 0.1) -> NaiveRouter:
    """The naive router with the same parameter values as one of the package, in float64."""
    E, d = router.embedding.shape
    token_expert = hasattr(router, "hidden")
    H, a = router.value.in_features, router.query.out_features
    naive = NaiveRouter(H, E, d, a, token_expert=token_expert, k=k, tau=tau).to(F64)
    with torch.no_grad():
        naive.emb.weight.copy_(router.embedding)
        for ours, theirs in ((naive.ln, router.norm), (naive.w_v, router.value)):
            ours.load_state_dict(theirs.state_dict())
        naive.w_q.weight.copy_(router.query.weight)
        naive.w_k.weight.copy_(router.key.weight)
        if naive.mlp is not None:
            naive.mlp[0].load_state_dict(router.hidden.state_dict())
            naive.mlp[2].weight.copy_(router.expand[..., :4].reshape(E * d, 4))
            naive.mlp[2].bias.copy_(router.expand[..., 4].reshape(E * d))
    return naive


def restate_model(model: Any, *, k: int | None, adapter: str = "default") -> nn.Module:
    """A float64 copy of the base model in which every mixture layer is a `NaiveLayer` of the same parameters."""
    base = copy.deepcopy(model.get_base_model()).to(F64)
    for module in base.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for name, layer in [(n, m) for n, m in base.named_modules() if isinstance(m, MixtureLinear)]:
        config = model.peft_config[adapter]
        naive = NaiveLayer(
            layer.base_layer,
            restate_router(layer.moe_lora_router[adapter], k=k),
            layer.moe_lora_A[adapter].detach().clone(),
            layer.moe_lora_B[adapter].detach().T.clone(),
            r=config.r,
            alpha=config.lora_alpha,
        )
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, naive)
    return base


def layers(naive_model: nn.Module) -> dict[str, NaiveLayer]:
    return {name: m for name, m in naive_model.named_modules() if isinstance(m, NaiveLayer)}


def grads_in_package_layout(layer: NaiveLayer) -> dict[str, Tensor]:
    """Gradients under the package's names and shapes."""
    router, grads = layer.router, {"A": layer.A.grad, "B": layer.Bm.grad.T}  # type: ignore[union-attr]
    named = {
        "embedding": router.emb.weight,
        "norm.weight": router.ln.weight,
        "norm.bias": router.ln.bias,
        "value.weight": router.w_v.weight,
        "value.bias": router.w_v.bias,
        "query.weight": router.w_q.weight,
        "key.weight": router.w_k.weight,
    }
    if router.mlp is not None:
        named |= {"hidden.weight": router.mlp[0].weight, "hidden.bias": router.mlp[0].bias}
        weight, bias = router.mlp[2].weight.grad, router.mlp[2].bias.grad
        grads["expand"] = torch.cat([weight, bias.unsqueeze(1)], dim=1).view(router.E, router.d, 5)
    return {**grads, **{name: p.grad for name, p in named.items()}}


def gjs_loss(p: Tensor, mask: Tensor) -> Tensor:
    """relu(log E - (H_b - H_c)) / log E over real tokens; p (B, T, E), mask (B, T)."""
    rows = [p[b, t] for b in range(p.shape[0]) for t in range(p.shape[1]) if mask[b, t]]
    n, log_e = len(rows), math.log(p.shape[-1])
    m = torch.stack(rows).sum(0) / n
    h_b = -(m * torch.log(m + 1e-9)).sum()
    h_c = torch.stack([-(row * torch.log(row + 1e-9)).sum() for row in rows]).sum() / n
    return torch.relu(log_e - (h_b - h_c)) / log_e


def similarity_loss(h: Tensor, w: Tensor, mask: Tensor, *, beta_s: float = 1.0, beta_d: float = 1.5) -> Tensor:
    """beta_s mean((1-Sr) Sx) + beta_d mean(Sr (1-Sx)); h (B, T, H), w (B, T, E), mask (B, T)."""
    real = [mask[b].bool() for b in range(len(mask))]
    x_bar = [h[b][keep].mean(0).detach() for b, keep in enumerate(real)]
    w_bar = [w[b][keep].mean(0) for b, keep in enumerate(real)]
    pull, push = [], []
    for i in range(len(mask)):
        for j in range(len(mask)):
            s_x = (x_bar[i] @ x_bar[j]) / (x_bar[i].norm() * x_bar[j].norm())
            s_r = (w_bar[i] @ w_bar[j]) / (w_bar[i].norm() * w_bar[j].norm())
            pull.append((1 - s_r) * s_x)
            push.append(s_r * (1 - s_x))
    return beta_s * torch.stack(pull).mean() + beta_d * torch.stack(push).mean()


def auxiliary_loss(
    naive_model: nn.Module, mask: Tensor, *, mutual_information: bool = True, similarity: bool = True
) -> Tensor:
    """Sum over routers. The balance term sees the routing weights if the similarity term is on, else the dense p."""
    total = torch.zeros((), dtype=F64)
    for layer in layers(naive_model).values():
        assert layer.seen is not None
        h, _, p, w = layer.seen
        if mutual_information:
            total = total + gjs_loss(w if similarity else p, mask)
        if similarity:
            total = total + similarity_loss(h, w, mask)
    return total
