"""The routers' exact gradient: autograd's, of losses written from the papers' equations over what each router saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

import moesaic
from tests.loops import watched
from tests.tiny import llama, mixtures, router_parameters, small, t5, wrap

Gradients = dict[str, Tensor]
Loop = Callable[..., Any]


class RoutedTrainer(moesaic.RoutedTrainerMixin, Trainer): ...


class RoutedSFTTrainer(moesaic.RoutedTrainerMixin, SFTTrainer): ...


def logits_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss function of one's own: cross-entropy from logits, normalised over the accumulated batch."""
    flat = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class OwnLoss(Trainer):
    """Overrides compute_loss with a mean over the micro-batch, as the documentation of Trainer suggests."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = logits_loss(outputs, labels, (labels[:, 1:] != -100).sum())
        return (loss, outputs) if return_outputs else loss


def sequences_of(batch: dict[str, Tensor], name: str) -> list[Tensor]:
    """Flat indices of the real tokens of each sequence that run through module `name`."""
    if ".decoder." in name and not name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
        return list(torch.arange(batch["labels"].numel()).view_as(batch["labels"]))
    ids = batch["input_ids"]
    where = torch.arange(ids.numel()).view_as(ids)
    if batch.get("attention_mask") is not None:
        return [where[i][batch["attention_mask"][i].bool()] for i in range(len(ids))]
    found: list[list[int]] = []
    for index, position in enumerate(batch["position_ids"].flatten().tolist()):
        if position == 0:
            found.append([])
        found[-1].append(index)
    return [torch.tensor(part) for part in found]


def kept(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Dense probabilities and a mask of the k largest of each row."""
    probs = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    rank = (probs.unsqueeze(-2) > probs.unsqueeze(-1)).sum(-1)
    return probs, rank < k


def hotmoe_loss(h: Tensor, logits: Tensor, sequences: list[Tensor], earlier: list[tuple[Tensor, ...]]) -> Tensor:
    """Mutual information and similarity of one router from its inputs (N, d) and logits (N, E), over a step so far."""
    probs, chosen = kept(logits, 2)
    scores = torch.where(chosen, torch.exp(probs / 0.1), logits.new_zeros(()))
    weights = scores / scores.sum(-1, keepdim=True)
    real = torch.cat([*(rows for _, _, rows in earlier), weights[torch.cat(sequences)]])
    log_e, mean = math.log(weights.shape[-1]), real.mean(0)
    h_balance, h_certain = -(mean * (mean + 1e-9).log()).sum(), -(real * (real + 1e-9).log()).sum(-1).mean()
    information = torch.relu(log_e - (h_balance - h_certain)) / log_e
    now = [(h[s].mean(0).detach(), weights[s].mean(0)) for s in sequences]
    pairs = [(x, w) for x, w, _ in earlier] + now
    earlier += [(x, w.detach(), weights[s].detach()) for (x, w), s in zip(now, sequences, strict=True)]
    cosine = nn.functional.cosine_similarity
    total = torch.zeros((), dtype=torch.float64)
    for x_i, w_i in pairs:
        for x_j, w_j in pairs:
            s_x, s_r = cosine(x_i, x_j, dim=0), cosine(w_i, w_j, dim=0)
            total = total + (1 - s_r) * s_x + 1.5 * s_r * (1 - s_x)
    return information + total / len(pairs) ** 2


def mola_loss(h: Tensor, logits: Tensor, sequences: list[Tensor], earlier: list[tuple[Tensor, ...]]) -> Tensor:
    """Switch balance of one router: E * sum_e f_e P_e."""
    probs, chosen = kept(logits[torch.cat(sequences)], 2)
    return logits.shape[-1] * (chosen.to(probs).mean(0) / 2 * probs.mean(0)).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {"hotmoe": hotmoe_loss, "mola": mola_loss}


def exact(
    model: PeftModel, batches: list[dict[str, Any]], shares: list[float], *, autocast: bool = False
) -> tuple[Gradients, list[float]]:
    """Gradient of `sum_i shares[i] * aux_i` over the micro-batches of one step, and each aux_i."""
    config: Any = model.peft_config["default"]
    seen: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        layer.moe_lora_router["default"].register_forward_hook(
            lambda _, args, out, name=name: seen.append((name, args[0], out))
        )
        for name, layer in mixtures(model).items()
    ]
    model.train().zero_grad()
    windows: dict[str, list[tuple[Tensor, ...]]] = {}
    values = []
    for batch, share in zip(batches, shares, strict=True):
        seen.clear()
        inputs = {k: v for k, v in batch.items() if k not in ("num_items_in_batch", "fused_lm_head")}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(**inputs)
        total = torch.zeros((), dtype=torch.float64)
        for name, h, logits in seen:
            flat_h, flat_logits = h.flatten(0, -2).double(), logits.flatten(0, -2).double()
            window = windows.setdefault(name, [])
            total = total + LOSSES[config.method](flat_h, flat_logits, sequences_of(batch, name), window)
        total = config.aux_weight * total
        values.append(total.item())
        (share * total).backward()
    for handle in handles:
        handle.remove()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in router_parameters(model).items()
    }
    model.zero_grad()
    return gradients, values


def assert_same(found: Gradients, expected: Gradients, *, tolerance: float = 1e-3) -> None:
    """Ratio 1 within `tolerance`, and no other direction, for each router and for all together."""
    groups: dict[str, list[str]] = {"all": list(expected)}
    for name in expected:
        groups.setdefault(name.partition(".moe_lora_router.")[0], []).append(name)
    assert len(groups) > 3
    for group, names in groups.items():
        f = torch.cat([found[n].flatten().double() for n in names])
        e = torch.cat([expected[n].flatten().double() for n in names])
        assert e.norm() > 1e-8, f"{group}: nothing to compare with"
        ratio = (f @ e / (e @ e)).item()
        assert ratio == pytest.approx(1, abs=tolerance), f"{group}: ratio {ratio}"
        assert (f - e).norm() <= tolerance * e.norm(), f"{group}: off by {((f - e).norm() / e.norm()).item():.2e}"


def token_shares(batches: list[dict[str, Any]]) -> list[float]:
    counts = [(b["labels"][..., 1:] != -100).sum().item() for b in batches]
    return [c / sum(counts) for c in counts]


def equal_shares(batches: list[dict[str, Any]]) -> list[float]:
    return [1 / len(batches)] * len(batches)


TARGETS = ["q_proj", "o_proj", "down_proj"]


def check(
    make: Callable[[float], PeftModel],
    loop: Callable[[PeftModel], Any],
    *,
    micro_batches: int,
    shares: Callable[[list[dict[str, Any]]], list[float]],
    difference: bool = False,
    autocast: bool = False,
) -> list[float]:
    """Train one step with `loop(make(weight))` and compare; returns the exact value of each micro-batch's loss."""
    weight = 1.0 if difference else 0.01
    watch = watched(loop(make(weight)))
    assert len(watch.batches) == micro_batches
    assert len(watch.gradients) == 1
    found = watch.gradients[0]
    if difference:
        without = watched(loop(make(0.0))).gradients[0]
        assert sum(g.abs().sum() for g in without.values()) > 0, "the task gives routers a gradient of its own"
        found = {n: g - without[n] for n, g in found.items()}
    expected, values = exact(make(weight), watch.batches, shares(watch.batches), autocast=autocast)
    assert_same(found, expected)
    return values


def mixture(
    method: str = "hotmoe", *, random_b: bool = False, build: Callable[..., Any] = llama, **overrides: Any
) -> Callable[[float], PeftModel]:
    """Base weights of size one half: with the usual 0.02, hidden states are noise and routers near uniform."""
    settings = {"target_modules": TARGETS, **overrides}
    base = build(**({"initializer_factor": 3.0} if build is t5 else {"initializer_range": 0.5}))
    return lambda weight: wrap(copy.deepcopy(base), small(method, aux_weight=weight, **settings), random_b=random_b)
