"""What is measured: one frozen linear, and a training step of a small Llama, under LoRA and every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.host import TARGETS, TASK_IDS, find_host
from moesaic.lora import METHODS, MixtureConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 1024

LOOP = "loop over experts"
FROZEN = "frozen base"
NO_METHOD = {"custom"}
"""Registered, but a recombination of the others."""
COUNTED = {"d": 64, "layers": 4, "batch": 2, "tokens": 32}
"""Kernels are counted on a smaller model: their number does not depend on the width."""

Step = Callable[[], None]
Size = dict[str, Any]
"""Of a model: d, layers, batch and tokens; its dtype by name (float32 where left out); and `Mixtures`' fields."""


@dataclass(frozen=True)
class Mixtures:
    """How large all mixtures of a table are, and with them the LoRA that they are measured beside."""

    experts: int = 8
    r: int = 8
    top_k: int = 2
    dropout: float = 0.0

    @classmethod
    def of(cls, size: Size) -> Mixtures:
        return cls(**{f.name: size[f.name] for f in fields(cls) if f.name in size})

    @property
    def rank(self) -> int:
        """Of all experts together."""
        return self.experts * self.r


USUAL = Mixtures()


class OneLinear(nn.Module):
    """A single frozen linear inside a list of one block, as the tuner expects blocks."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(d, d)})])

    def forward(self, x: Tensor) -> Tensor:
        block = self.layers[0]
        assert isinstance(block, nn.ModuleDict)
        return cast(Tensor, block["linear"](x))


def dtype_of(size: Size) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, size.get("dtype", "float32")))


def in_autocast(size: Size) -> Any:
    """As a training loop does where the base is not in float32."""
    dtype = dtype_of(size)
    return torch.autocast(torch.get_default_device().type, dtype=dtype, enabled=dtype != torch.float32)


def model_of(size: Size) -> LlamaForCausalLM:
    model: Any = llama(size["d"], size["layers"])
    return cast(LlamaForCausalLM, model.to(dtype_of(size)))


def llama(d: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def methods(level: str) -> list[str]:
    """Names of the methods whose experts, trained with them, are of this level: `linear` or `block`."""
    own = {name: cls for name, cls in METHODS.items() if not cls.kind.needs_adapters and name not in NO_METHOD}
    return [name for name, cls in own.items() if cls.level == level]


def mixture(method: str, targets: list[str], made: Mixtures = USUAL, **settings: Any) -> MixtureConfig:
    cls = METHODS[method]
    wanted = {
        "r": made.r, "num_experts": made.experts, "top_k": made.top_k, "lora_dropout": made.dropout, **settings,
    }  # fmt: skip
    known = {f.name for f in fields(cls)}
    config = cls(target_modules=targets, **{k: v for k, v in wanted.items() if k in known})
    config.size_is_meant = True  # LoRA beside it has as many experts' rank
    return config


def lora(targets: list[str], *, rank: int = USUAL.rank, dropout: float = 0.0, **settings: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=targets, lora_dropout=dropout, **settings)


def arms(targets: list[str], names: Iterable[str], made: Mixtures = USUAL, **settings: Any) -> dict[str, Any]:
    """Name -> config: LoRA of rank E*r, the named methods, HotMoE's two routers alone, and a loop over experts."""
    configs: dict[str, Any] = {"lora": lora(targets, rank=made.rank, dropout=made.dropout)}
    for name in names:
        configs[name] = mixture(name, targets, made, **settings)
        if name == "hotmoe":
            configs["hotmoe (expert-expert only)"] = mixture(name, targets, made, ee_fraction=1.0, **settings)
            configs["hotmoe (token-expert only)"] = mixture(name, targets, made, ee_fraction=0.0, **settings)
    configs[LOOP] = mixture("mola", targets, made, backend="reference", **settings)
    return configs


def wrapped(base: nn.Module, config: Any) -> Any:
    """The base with a config's adapter, or what a function of it makes."""
    return config(base) if callable(config) else get_peft_model(cast(Any, base), config)


def linear_steps(names: Iterable[str], size: Size) -> dict[str, Step]:
    """Forward and backward of one wrapped linear, gradient to the input included."""
    dtype, d = dtype_of(size), size["d"]
    x = torch.randn(1, size["tokens"], d, dtype=dtype, requires_grad=True)
    grad = torch.randn(x.shape, dtype=dtype)

    def step(model: nn.Module) -> Step:
        def run() -> None:
            with in_autocast(size):
                out = model(x)
            out.backward(grad)
            x.grad = None
            for p in model.parameters():
                p.grad = None

        return run

    steps = {"frozen linear": step(OneLinear(d).to(dtype).requires_grad_(False))}
    configs = arms(["linear"], names, Mixtures.of(size), aux_weight=0.0)
    configs.pop("hotmoe", None)  # its two routers are measured by themselves: one layer has one of them
    for name, config in configs.items():
        model = get_peft_model(cast(Any, OneLinear(d).to(dtype)), config).train()
        if isinstance(config, MixtureConfig):
            find_host(model).pinned_tasks = torch.tensor([1])
        steps[name] = step(model)
    return steps


def batch_for(config: Any, size: Size) -> dict[str, Tensor]:
    """Random tokens, the first quarter a prompt; task ids for mixtures, and targets for those that need them."""
    batch, tokens = size["batch"], size["tokens"]
    ids = torch.randint(0, VOCABULARY, (batch, tokens))
    labels = ids.clone()
    labels[:, : tokens // 4] = -100
    inputs = {"input_ids": ids, "labels": labels}
    if isinstance(config, MixtureConfig):
        experts = Mixtures.of(size).experts
        inputs[TASK_IDS] = torch.arange(batch) % experts
        if config.kind.needs_targets:
            inputs[TARGETS] = torch.rand(batch, experts).softmax(dim=-1)
    return inputs


def model_step(config: Any, size: Size, *, optimizer: bool = True) -> Step:
    """A whole training step: forward, loss with auxiliary losses, backward, AdamW."""
    torch.manual_seed(0)
    return stepping(wrapped(model_of(size), config).train(), config, size, optimizer=optimizer)


def stepping(model: Any, config: Any, size: Size, *, optimizer: bool = True) -> Step:
    """`model_step` of a model that is adapted already."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4)
    inputs = batch_for(config, size)

    def run() -> None:
        with in_autocast(size):
            loss = model(**inputs).loss
        loss.backward()
        if optimizer:
            adamw.step()
        adamw.zero_grad()

    return run


def frozen_steps(size: Size) -> tuple[Step, Step]:
    """Forward and backward to the input, nothing trained: of the whole model, and of its FFNs alone."""
    torch.manual_seed(0)
    model, dtype = model_of(size).train().requires_grad_(False), dtype_of(size)
    labels = batch_for(None, size)["labels"]
    x = torch.randn(*labels.shape, size["d"], dtype=dtype, requires_grad=True)
    grad = torch.randn(x.shape, dtype=dtype)
    ffns: list[Any] = [layer.mlp for layer in model.model.layers]

    def whole() -> None:
        with in_autocast(size):
            loss = model(inputs_embeds=x, labels=labels).loss
        loss.backward()
        x.grad = None

    def ffn() -> None:
        for mlp in ffns:
            mlp(x).backward(grad)
        x.grad = None

    return whole, ffn
