"""Dense feed-forward layers of stock models: found, read, cut into experts and joined again, bit for bit.

    gated   y = (act(x Wg^T) * (x Wu^T)) Wd^T + b        Llama, Qwen, Mistral, Gemma …
    plain   y = act(x Wu^T + bu) Wd^T + b                 GPT-2, BERT, OPT, GPT-NeoX, Phi …

Each of the d_ff hidden neurons is a row of Wg and Wu and a column of Wd, and y is a sum over neurons. So an expert is
any set of them, and experts that part the neurons add up to the dense layer. The output's bias b belongs to the layer,
not to its experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moesaic.errors import ConfigError

PLAIN = (
    ("c_fc", "act", "c_proj"),
    ("fc1", "activation_fn", "fc2"),
    ("fc1", "act", "fc2"),
    ("dense_h_to_4h", "act", "dense_4h_to_h"),
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
)
"""First linear, activation and last linear of plain layers, by the names that they go by."""
GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")


@dataclass(frozen=True)
class Seat:
    """Where a feed-forward layer sits in a model, and what it is made of, by names within `name`."""

    name: str
    first: tuple[str, ...]
    """The gate and the up projection, or the up projection alone."""
    activation: str
    last: str
    d_model: int
    d_ff: int

    @property
    def is_gated(self) -> bool:
        return len(self.first) == 2


@dataclass
class Dense:
    """A layer's weights as PyTorch's linears have them: `gate` and `up` (d_ff, d_model), `down` (d_model, d_ff)."""

    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    bias: Tensor | None
    """Of the output, (d_model,)."""
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer itself: (..., d_model) to the same."""
        return nn.functional.linear(self.hidden(x), self.down, self.bias)

    def hidden(self, x: Tensor) -> Tensor:
        """a(x) (..., d_ff), what the last linear reads."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        return self.activation(up) if self.gate is None else self.activation(nn.functional.linear(x, self.gate)) * up


@dataclass
class Slices:
    """Experts of one width f: `gate` and `up` (N, f, d_model), `up_bias` (N, f), `down` (N, d_model, f)."""

    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor


def seats(model: nn.Module) -> list[Seat]:
    """All feed-forward layers of a dense model, in its order.

    Raises:
        ConfigError: where there is none of a known kind, or the model is a mixture already.
    """
    if getattr(model, "host", None) is not None:
        config: Any = model.config
        raise ConfigError(f"this model has the layers of {config.moesaic['method']} already")
    if any(type(module).__name__.endswith(("TopKRouter", "TopkRouter")) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} is a mixture already: `moesaic convert rmoe` links its routers")
    found = [seat for name, module in model.named_modules() if (seat := _seat(name, module)) is not None]
    if not found:
        known = ", ".join(dict.fromkeys("/".join((first, last)) for first, _, last in PLAIN))
        raise ConfigError(
            f"{type(model).__name__} has no feed-forward layer of a known kind: gate_proj/up_proj/down_proj without "
            f"biases on the first two, or {known}"
        )
    return found


def _seat(name: str, module: nn.Module) -> Seat | None:
    parts = dict(module.named_children())
    if set(GATED) - {"act_fn"} <= parts.keys() and callable(getattr(module, "act_fn", None)):
        gate, up, down = (parts[part] for part in ("gate_proj", "up_proj", "down_proj"))
        shapes = _shape(gate), _shape(up), _shape(down)
        if None in shapes or any(getattr(linear, "bias", None) is not None for linear in (gate, up)):
            return None
        return Seat(name, ("gate_proj", "up_proj"), "act_fn", "down_proj", *cast(tuple[int, int], _shape(up)))
    for first, activation, last in PLAIN:
        up, down = _find(module, first), _find(module, last)
        if up is None or down is None or not callable(_find(module, activation)):
            continue
        shape = _shape(up)
        if shape is not None and _shape(down) == shape[::-1]:
            return Seat(name, (first,), activation, last, *shape)
    return None


def _find(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _shape(linear: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out)."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    return (linear.in_features, linear.out_features) if isinstance(linear, nn.Linear) else None


def read(model: nn.Module, seat: Seat) -> Dense:
    """The layer's weights: the model's own, not copies."""
    module = model.get_submodule(seat.name)
    linears = [_find(module, name) for name in (*seat.first, seat.last)]
    weights = [linear.weight.t() if isinstance(linear, Conv1D) else linear.weight for linear in linears]
    gate = weights[0] if seat.is_gated else None
    return Dense(
        gate, weights[-2], linears[-2].bias, weights[-1], linears[-1].bias, activation=_find(module, seat.activation)
    )


@torch.no_grad()
def check_plain(model: nn.Module) -> None:
    """Raise ConfigError where a layer is more than its matrices say: then no experts can be cut out of it."""
    shared = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for seat in seats(model):
        module, dense = model.get_submodule(seat.name), read(model, seat)
        if not dense.up.is_floating_point() or not dense.down.is_floating_point():
            raise ConfigError(
                f"{seat.name} is quantised: experts are cut out of weights in float32, bfloat16 or float16"
            )
        if shared[id(module)] > 1:
            raise ConfigError(f"{seat.name} is used by several layers: experts are cut out of layers of their own")
        if not seat.is_gated:
            continue  # some of these are no module of their own
        x = torch.linspace(-1, 1, 2 * seat.d_model, device=dense.up.device, dtype=dense.up.dtype).view(2, -1)
        was = module.training
        module.eval()
        got, wanted = module(x), dense(x)
        module.train(was)
        near = 1e-3 if x.element_size() > 2 else 0.1
        if not isinstance(got, Tensor) or (got - wanted).abs().max() > near * wanted.abs().max():
            raise ConfigError(
                f"{type(module).__name__} does more than (act(x Wg) * (x Wu)) Wd: its experts would not make the same"
            )


def even(d_ff: int, num_experts: int) -> Tensor:
    """Neurons of N experts of equal width, in their order: (N, d_ff / N).

    Raises:
        ConfigError: where N does not divide d_ff.
    """
    if num_experts < 1 or d_ff % num_experts:
        near = sorted((n for n in range(1, d_ff + 1) if d_ff % n == 0), key=lambda n: abs(n - num_experts))[:3]
        raise ConfigError(
            f"d_ff={d_ff} cannot be cut into num_experts={num_experts} equal ones: it can into "
            f"{' or '.join(map(str, sorted(near)))}"
        )
    return torch.arange(d_ff).view(num_experts, -1)


def cut(dense: Dense, neurons: Tensor) -> Slices:
    """Experts of the given neurons (N, f); the same neuron may be several experts'."""
    neurons = neurons.to(dense.up.device)
    return Slices(
        None if dense.gate is None else dense.gate[neurons],
        dense.up[neurons],
        None if dense.up_bias is None else dense.up_bias[neurons],
        dense.down[:, neurons].transpose(0, 1),
    )


def join(slices: Slices, neurons: Tensor, *, bias: Tensor | None, activation: Callable[[Tensor], Tensor]) -> Dense:
    """The dense layer whose neurons the experts part.

    Raises:
        ConfigError: where a neuron is no expert's, or several experts'.
    """
    order = neurons.flatten().argsort()
    if not torch.equal(neurons.flatten()[order], torch.arange(neurons.numel())):
        raise ConfigError("these experts do not part the neurons between them: only those that do can be joined")
    order = order.to(slices.up.device)
    return Dense(
        None if slices.gate is None else slices.gate.flatten(0, 1)[order],
        slices.up.flatten(0, 1)[order],
        None if slices.up_bias is None else slices.up_bias.flatten()[order],
        slices.down.transpose(0, 1).flatten(1)[:, order],
        bias,
        activation,
    )
