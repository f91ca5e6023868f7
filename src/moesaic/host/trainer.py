"""RoutedTrainerMixin: the auxiliary loss in any transformers.Trainer, whatever loss it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from moesaic.errors import TrainingError
from moesaic.host.carrier import with_gradient
from moesaic.host.hooks import Host, find_host

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class RoutedTrainerMixin(_Base):
    """Adds the routers' auxiliary loss to a Trainer's own, once and at the right weight.

        class RoutedSFTTrainer(RoutedTrainerMixin, SFTTrainer): ...

    The stock trainers work without it as long as their loss is linear in the labelled tokens. With it, label
    smoothing, DFT, a custom loss function and every other `compute_loss` work too. Its weight in a step is
    1/accumulation for each micro-batch; the stock path weighs a micro-batch by its labelled tokens. The two agree for
    equal micro-batches. It also tells routers and losses how far the training is. The `loss` that is logged stays the
    task's; the auxiliary loss is logged beside it, as `router_aux_loss`.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        host = self._host()
        if host is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        host.take_collected()
        host.progress = self.state.global_step / max(self.state.max_steps, 1)
        host.external = True
        try:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            host.external = False
            aux = host.take_collected()
        if aux is None or not torch.is_grad_enabled():
            return result
        self._aux_values.append(aux.detach())
        steps = self.current_gradient_accumulation_steps if self._scaled_for_accumulation(num_items_in_batch) else 1
        if return_outputs:
            loss, outputs = result
            return with_gradient(loss, aux / steps), outputs
        return with_gradient(result, aux / steps)

    def _scaled_for_accumulation(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer leaves the division by the accumulation steps to the loss (see Trainer.training_step)."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counted or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._aux_values and "loss" in logs:
            mean = torch.stack(self._aux_values).mean()
            logs = {**logs, "router_aux_loss": self.accelerator.reduce(mean, reduction="mean").item()}
            self._aux_values.clear()
        super().log(logs, *args, **kwargs)

    @property
    def _aux_values(self) -> list[Tensor]:
        return self.__dict__.setdefault("_aux_value_list", [])

    def _host(self) -> Host | None:
        if "_routing_host" not in self.__dict__:
            try:
                self.__dict__["_routing_host"] = find_host(cast(nn.Module, self.model))
            except TrainingError:
                self.__dict__["_routing_host"] = None
        return self.__dict__["_routing_host"]
