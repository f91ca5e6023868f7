"""How the auxiliary loss reaches the optimiser in a training loop we do not own.

| the loop takes | the auxiliary loss is | examples |
| --- | --- | --- |
| `output.loss` | added to it | HF Trainer, a loop of your own |
| `output.log_probs` | subtracted from each labelled log-prob | TRL's SFTTrainer |
| `output.logits` only | reported, with a warning | label smoothing, a custom loss function |
| nothing: the loop adds it itself | reported | `RoutedTrainerMixin` |

Their values stay as they were: what is added has a gradient, and is nothing. So a loss that is logged is the task's,
whatever the loop, and can be compared with that of a model without routers, and with an evaluation's. The auxiliary
loss itself is always reported as `output.router_aux_loss`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from moesaic.host.frames import Frame

Warn = Callable[[str], None]


@lru_cache(maxsize=64)
def with_router_aux_loss(cls: type[ModelOutput]) -> type[ModelOutput]:
    """`cls` with one more field. A declared field, since DDP rebuilds outputs from their fields."""
    field = ("router_aux_loss", Tensor | None, dataclasses.field(default=None))
    made = dataclasses.make_dataclass(cls.__name__, [field], bases=(cls,))
    made.__module__ = __name__
    return made


def carry(frame: Frame, output: Any, aux: Tensor, *, external: bool, warn: Warn) -> Any:
    """The base model's output with the auxiliary loss in it; see the table above. `external`: the loop adds it."""
    if isinstance(output, tuple):
        if not frame.labelled or external or not isinstance(output[0], Tensor) or output[0].dim() != 0:
            return None
        return (with_gradient(output[0], aux * frame.share), *output[1:])
    if not isinstance(output, ModelOutput):
        return None
    fields = dataclasses.fields(output)  # type: ignore[arg-type]
    values: dict[str, Any] = {f.name: getattr(output, f.name, None) for f in fields}
    if not external:
        if isinstance(values.get("log_probs"), Tensor):
            values["log_probs"] = into_log_probs(values["log_probs"], values["label_mask"], aux, warn)
        elif isinstance(values.get("loss"), Tensor):
            values["loss"] = with_gradient(values["loss"], aux * frame.share)
        else:
            warn(
                "the training loss is computed from logits, where the routers' auxiliary loss cannot be added: train "
                "with moesaic.RoutedTrainerMixin, or add output.router_aux_loss to your loss"
            )
    if torch.compiler.is_compiling():  # a graph cannot declare a class
        made = type(output)(**values)
        made["router_aux_loss"] = aux
        return made
    return with_router_aux_loss(type(output))(**values, router_aux_loss=aux)


def share_of_step(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | float:
    """This micro-batch's labels over `num_items_in_batch`, the labels of all micro-batches; 1 when it is not passed.

    Counts as Trainer does: causal models shift their labels, so the first of each row is never a target.
    """
    num_items, labels = arguments.get("num_items_in_batch"), arguments.get("shift_labels", arguments.get("labels"))
    if num_items is None or not isinstance(labels, Tensor):
        return 1.0
    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    shifts = shifts and not getattr(model.config, "is_encoder_decoder", False) and "shift_labels" not in arguments
    return ((labels[..., 1:] if shifts else labels) != -100).sum() / num_items


def into_log_probs(log_probs: Tensor, label_mask: Tensor, aux: Tensor, warn: Warn) -> Tensor:
    """Subtract `aux` from each labelled log-prob.

    The loop's `-sum(log_probs) / num_items` then weighs it by the share of labelled tokens. That holds only while
    the loss is linear in the log-probs; a loss that is not (DFT, preferences) is told by its uneven gradient.
    """
    mask = label_mask.bool()

    def even(grad: Tensor) -> None:
        labelled = grad[mask]
        if labelled.numel() and (labelled.max() - labelled.min()) > 1e-4 * labelled.abs().max():
            warn(
                "this loss is not a plain sum of log-probs, so the routers' auxiliary loss enters it at the wrong "
                "weight: train with moesaic.RoutedTrainerMixin"
            )

    if log_probs.requires_grad:
        log_probs.register_hook(even)
    return log_probs - (aux - aux.detach()).to(log_probs.dtype) * mask.to(log_probs.dtype)


def with_gradient(loss: Tensor, aux: Tensor) -> Tensor:
    """A loss as it is, with the gradient of `aux` too; not a number where that is none."""
    return loss + (aux - aux.detach()).to(loss.device, loss.dtype)


class Delivery:
    """Tells whether the auxiliary loss reaches the optimizer: a loop may ignore the output's loss altogether."""

    def __init__(self) -> None:
        self._expected: tuple[str, Hashable] = ("", None)
        self._arrived = True

    def expect(self, aux: Tensor, *, adapter: str, step: Hashable, warn: Warn) -> None:
        """Warn when the optimizer stepped since the last forward and no auxiliary loss of that step had a backward."""
        if (adapter, step) != self._expected:
            if self._expected[0] == adapter and not self._arrived:
                warn(
                    "the optimizer stepped, but the routers' auxiliary loss was not in the loss: train with "
                    "moesaic.RoutedTrainerMixin, or add output.router_aux_loss to your loss"
                )
            self._expected, self._arrived = (adapter, step), False
        aux.register_hook(self._arrive)

    def _arrive(self, grad: Tensor) -> None:
        self._arrived = True
