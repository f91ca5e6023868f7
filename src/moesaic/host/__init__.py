"""The next floor: how a mixture lives inside a Transformers model."""

from moesaic.host.context import (
    router_aux_loss,
    routing_prompt_length,
    routing_scores,
    routing_tasks,
    set_training_progress,
    trace,
)
from moesaic.host.frames import Frame
from moesaic.host.hooks import SCORES, TARGETS, TASK_IDS, Host, find_host
from moesaic.host.steps import optimizer_steps
from moesaic.host.trainer import RoutedTrainerMixin

__all__ = [
    "SCORES",
    "TARGETS",
    "TASK_IDS",
    "Frame",
    "Host",
    "RoutedTrainerMixin",
    "find_host",
    "optimizer_steps",
    "router_aux_loss",
    "routing_prompt_length",
    "routing_scores",
    "routing_tasks",
    "set_training_progress",
    "trace",
]
