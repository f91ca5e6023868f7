"""Experts that are slices of a feed-forward layer: stock Transformers models in, stock Transformers models out."""

from moesaic.ffn.cmoe import CMoE
from moesaic.ffn.method import Method, method_of, methods
from moesaic.ffn.model import convert, fresh
from moesaic.ffn.places import active_parameters, expert_layers
from moesaic.ffn.read_me import ReadMe
from moesaic.ffn.recurrent import RMoE
from moesaic.ffn.schedules import KSchedule, Schedule
from moesaic.ffn.slimming import set_top_k, top_k
from moesaic.ffn.smoe_dropout import SMoEDropout
from moesaic.ffn.stock import as_mixtral
from moesaic.ffn.stored import class_of, is_converted, load

__all__ = [
    "CMoE",
    "KSchedule",
    "Method",
    "RMoE",
    "ReadMe",
    "SMoEDropout",
    "Schedule",
    "active_parameters",
    "as_mixtral",
    "class_of",
    "convert",
    "expert_layers",
    "fresh",
    "is_converted",
    "load",
    "method_of",
    "methods",
    "set_top_k",
    "top_k",
]
