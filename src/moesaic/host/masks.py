"""Reading a stack's arguments: which tokens are real, and where packed sequences begin.

Masks arrive in five shapes, by attention backend, cache and architecture:

| what | shape | read as |
| --- | --- | --- |
| none | | every token is real |
| padding mask | (B, past + T) | its last T columns |
| prepared mask | (B, 1, T, keys), bool or additive | the last query's row, the columns of the current tokens |
| mapping | {"full_attention": one of these, ...} | the full-attention entry, else the first |
| flattened batch | position_ids restarting at 0 | no padding; a sequence begins at each 0 |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.host.frames import StackView

_CACHES = ("past_key_values", "past_key_value", "cache_params")


@cache
def _parameters(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(forward).parameters)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments of `module.forward` by name, the positional ones too."""
    if not args:
        return kwargs
    names = [p.name for p in _parameters(type(module).forward).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}


def num_tokens(arguments: Mapping[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value.shape[1] if value.dim() > 1 else None
    return None


def num_rows(arguments: Mapping[str, Any]) -> int | None:
    """Sequences in the batch, where it is not a packed one."""
    value = arguments.get("input_ids", arguments.get("inputs_embeds"))
    return len(value) if isinstance(value, Tensor) and value.dim() > 1 else None


def cache_of(arguments: Mapping[str, Any]) -> Any | None:
    for name in _CACHES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def past_length(arguments: Mapping[str, Any]) -> int:
    """Tokens already in the cache."""
    held = cache_of(arguments)
    if held is None:
        return 0
    if hasattr(held, "get_seq_length"):
        try:
            return int(held.get_seq_length())
        except (ValueError, TypeError, NotImplementedError):  # caches without attention layers
            pass
    return int(bool(getattr(held, "has_previous_state", False)))


def two_d(mask: Any, tokens: int | None, past: int = 0) -> Tensor | None:
    """Any mask as bool (B, tokens), True where a token is real; None when there is none or it cannot be told."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or tokens is None:
        return None
    if mask.dim() == 2:
        return mask[:, -tokens:].bool() if mask.shape[1] >= tokens else None
    if mask.dim() != 4:
        return None
    keys = mask[:, 0, -1]
    keys = keys if keys.dtype == torch.bool else keys > torch.finfo(keys.dtype).min / 2
    if keys.shape[1] < tokens:
        return None
    return keys[:, past : past + tokens] if keys.shape[1] > past + tokens else keys[:, -tokens:]


def prompt_of(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """True on the tokens without a label (batch, tokens); None unless labels and input have the same tokens."""
    ids, labels = arguments.get("input_ids"), arguments.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return None if encoder_decoder else labels == -100


def packed_sequences(arguments: Mapping[str, Any]) -> Tensor | None:
    """Index of the sequence each token belongs to, when several share a row; None otherwise.

    Rows packed without restarting positions ("wrapped" packing) have no boundaries to find.
    """
    if isinstance(arguments.get("seq_idx"), Tensor):
        seq_idx = arguments["seq_idx"]
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    else:
        positions = arguments.get("position_ids")
        if not isinstance(positions, Tensor) or positions.dim() != 2 or arguments.get("attention_mask") is not None:
            return None
        starts = positions == 0
        starts[:, :1] = True
    return starts.flatten().cumsum(0).view_as(starts) - 1


def view_of(arguments: Mapping[str, Any], *, training: bool) -> tuple[StackView, StackView]:
    """What a stack was told of its own tokens, and of the encoder's (for cross-attention)."""
    tokens = num_tokens(arguments)
    mask = arguments.get("attention_mask")
    past = past_length(arguments) if (isinstance(mask, Tensor) and mask.dim() == 4) or isinstance(mask, Mapping) else 0
    own = StackView(two_d(mask, tokens, past), packed_sequences(arguments) if training else None, tokens)
    states = arguments.get("encoder_hidden_states")
    length = states.shape[1] if isinstance(states, Tensor) else None
    return own, StackView(two_d(arguments.get("encoder_attention_mask"), length), tokens=length)
