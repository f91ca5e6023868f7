"""What people use today, to measure beside: PEFT's own ways with several adapters, and all experts in one einsum.

    lora, rank k*r       plain LoRA of the rank that a token's experts have together
    peft, E adapters     E LoRAs of rank r, all active: their sum
    peft, x-lora         the same behind X-LoRA's classifier, which reads a forward of its own; it forbids a KV cache
    peft, arrow          the same, frozen, behind Arrow's router, beside `arrow` here
    einsum               routed LoRA experts as it is written down: every expert's output of every token, then their sum

Each is a function from a base model, and how large the mixtures beside it are, to the model with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn

from moesaic.bench.arms import LINEARS, USUAL, Mixtures, lora
from moesaic.lora import METHODS

ACTIVE, SUM, XLORA, ARROW, EINSUM = "lora, rank k*r", "peft, E adapters", "peft, x-lora", "peft, arrow", "einsum"

Build = Callable[..., nn.Module]


def active(base: Any, made: Mixtures = USUAL) -> nn.Module:
    return get_peft_model(base, lora(LINEARS, rank=made.top_k * made.r))


def adapters(base: Any, made: Mixtures = USUAL) -> PeftModel:
    """E LoRAs of rank r, all active and trained."""
    names, config = [f"expert{i}" for i in range(made.experts)], lora(LINEARS, rank=made.r, init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    tuner: Any = model.base_model
    tuner.set_adapter(names)
    return model


def _with_saved(base: Any, made: Mixtures, build: Callable[[Any, list[str]], nn.Module]) -> nn.Module:
    """What is built of a base and the folders of such adapters, which it reads."""
    with tempfile.TemporaryDirectory() as folder:
        model = adapters(base, made)
        model.save_pretrained(folder)
        plain = model.unload()
        return build(plain, [str(Path(folder, f"expert{i}")) for i in range(made.experts)])


def xlora(base: Any, made: Mixtures = USUAL) -> nn.Module:
    def build(plain: Any, folders: list[str]) -> nn.Module:
        plain.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=plain.config.hidden_size, use_trainable_adapters=True,
            adapters={str(i): folder for i, folder in enumerate(folders)},
        )  # fmt: skip
        return get_peft_model(plain, config)

    return _with_saved(base, made, build)


def peft_arrow(base: Any, made: Mixtures = USUAL) -> nn.Module:
    from peft import ArrowConfig, create_arrow_model

    config = ArrowConfig(top_k=made.top_k)
    return _with_saved(base, made, lambda plain, folders: create_arrow_model(plain, folders, config))


def arrow(base: Any, made: Mixtures = USUAL) -> nn.Module:
    def build(plain: Any, folders: list[str]) -> nn.Module:
        return get_peft_model(plain, METHODS["arrow"](adapters=folders, top_k=made.top_k))

    return _with_saved(base, made, build)


class Einsum(nn.Module):
    """`y = W x + sum_e p_e B_e A_e x` for x (..., d_in), top-k p, as MoLA's; nothing is folded."""

    def __init__(self, linear: nn.Linear, made: Mixtures = USUAL) -> None:
        super().__init__()
        self.linear = linear
        self.top_k = made.top_k
        self.lora_router = nn.Linear(linear.in_features, made.experts, bias=False)
        self.lora_A = nn.Parameter(torch.randn(made.experts, made.r, linear.in_features) * 0.02)
        self.lora_B = nn.Parameter(torch.zeros(made.experts, linear.out_features, made.r))
        self.to(linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        p, chosen = self.lora_router(x).softmax(-1).topk(self.top_k, dim=-1)
        weights = torch.zeros(*x.shape[:-1], len(self.lora_A), dtype=p.dtype).scatter(
            -1, chosen, p / p.sum(-1, keepdim=True)
        )
        experts = torch.einsum("...d,erd->...er", x, self.lora_A)
        answers = torch.einsum("...er,eor->...eo", experts, self.lora_B)
        out: Tensor = self.linear(x) + torch.einsum("...e,...eo->...o", weights, answers)
        return out


def einsum(base: Any, made: Mixtures = USUAL) -> nn.Module:
    base.requires_grad_(False)
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS and isinstance(child, nn.Linear):
                setattr(module, name, Einsum(child, made))
    return base


TRAINED: dict[str, Build] = {ACTIVE: active, SUM: adapters, XLORA: xlora, EINSUM: einsum}
GENERATES: dict[str, Build] = {
    ACTIVE: active, SUM: adapters, ARROW: peft_arrow, "arrow": arrow, EINSUM: einsum,
}  # fmt: skip


def sized(builds: dict[str, Build], made: Mixtures) -> dict[str, Build]:
    """The same, beside mixtures of a size."""
    return {name: partial(build, made=made) for name, build in builds.items()}
