"""Experts that are slices of a feed-forward layer: stock Transformers models in, stock Transformers models out."""

from moesaic.ffn.cmoe import CMoE
from moesaic.ffn.model import Method, convert, expert_layers, fresh, load
from moesaic.ffn.read_me import ReadMe
from moesaic.ffn.recurrent import RMoE
from moesaic.ffn.schedules import KSchedule, Schedule
from moesaic.ffn.smoe_dropout import SMoEDropout, set_top_k, top_k
from moesaic.ffn.stock import as_mixtral

__all__ = [
    "CMoE",
    "KSchedule",
    "Method",
    "RMoE",
    "ReadMe",
    "SMoEDropout",
    "Schedule",
    "as_mixtral",
    "convert",
    "expert_layers",
    "fresh",
    "load",
    "set_top_k",
    "top_k",
]
