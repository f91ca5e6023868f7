"""Reading a stack's arguments: which tokens are real, and where packed sequences begin.

Masks arrive in five kinds, by attention backend, cache and architecture:

| what | shape | read as |
| --- | --- | --- |
| none | | every token is real |
| padding mask | (B, past + T) | its last T columns |
| prepared mask | (B, 1, T, keys), bool or additive | a token is real that may see itself |
| block mask | of flex attention | likewise |
| mapping | {"full_attention": one of these, ...} | the full-attention entry, else the first |

Sequences that share a row begin where `position_ids` do not go on by one (without a mask), where `seq_idx` changes, or,
by a prepared mask, at a token that may not see the one before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from moesaic.host.frames import Past, StackView

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


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def num_tokens(arguments: Mapping[str, Any]) -> int | None:
    for name in _TOKENS:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value.shape[1] if value.dim() > 1 else None
    return None


def num_rows(arguments: Mapping[str, Any]) -> int | None:
    """Sequences in the batch, where it is not a packed one."""
    value = arguments.get("input_ids", arguments.get("inputs_embeds"))
    return len(value) if isinstance(value, Tensor) and value.dim() > 1 else None


_PARTS = {
    "pixel_values": ("image_token_id", "image_token_index"),
    "pixel_values_videos": ("video_token_id", "video_token_index"),
    "input_features": ("audio_token_id", "audio_token_index"),
}


def parts_of(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """How many tokens of each sequence stand for images or sound (batch,), where there is one such input.

    None also with two: which of them a tower is given cannot be told.
    """
    ids, given = arguments.get("input_ids"), [name for name in _PARTS if isinstance(arguments.get(name), Tensor)]
    config = getattr(model, "config", None)
    token = next((t for n in _PARTS[given[0]] if (t := getattr(config, n, None)) is not None), None) if given else None
    if len(given) != 1 or token is None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    return (ids == token).sum(dim=1)


def cache_of(arguments: Mapping[str, Any]) -> Any | None:
    for name in _CACHES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def past_length(arguments: Mapping[str, Any]) -> Past | None:
    """Tokens already in the cache; None for some, in a cache that does not count them.

    A tensor () where a compiled forward finds it on a static cache: to look at it would break the graph.
    """
    held = cache_of(arguments)
    if held is None:
        return 0
    if hasattr(held, "get_seq_length"):
        try:
            length = held.get_seq_length()
            return length.clone() if torch.compiler.is_compiling() and isinstance(length, Tensor) else int(length)
        except (ValueError, TypeError, NotImplementedError):  # caches without attention layers
            pass
    begun = getattr(held, "has_previous_state", False)
    return None if (begun() if callable(begun) else begun) else 0


def two_d(mask: Any, tokens: int | None, past: Past = 0) -> Tensor | None:
    """Any mask as bool (B, tokens), True where a token is real; None when there is none or it cannot be told."""
    found = _allowed(mask, tokens, past, 0)
    if found is not None or tokens is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return found
    room = mask.shape[1] - tokens  # a static cache's mask may have some behind the tokens
    if isinstance(past, Tensor):
        return mask.index_select(1, _places(past, tokens, room)).bool() if room >= 0 else None
    begin = min(past, room)
    return mask[:, begin : begin + tokens].bool() if begin >= 0 else None


def _entry(mask: Any) -> Any:
    """The mask itself, of a mapping its full-attention entry or else its first."""
    return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, Mapping) else mask


def _places(past: Tensor, tokens: int, room: int) -> Tensor:
    """The columns of a mask at which `tokens` behind `past` stand (tokens,)."""
    return past.clamp(max=room) + torch.arange(tokens, device=past.device)


def _allowed(mask: Any, tokens: int | None, past: Past, back: int) -> Tensor | None:
    """Whether each token may see the one `back` places before it, or itself (B, tokens - back), by a prepared mask."""
    mask = _entry(mask)
    if tokens is None:
        return None
    if isinstance(mask, BlockMask):
        rows, at = torch.arange(mask.shape[0])[:, None], torch.arange(back, tokens)
        found: Tensor = mask.mask_mod(*(i.to(mask.kv_indices.device) for i in (rows, rows * 0, at, past + at - back)))
        return found.expand(len(rows), len(at))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] < tokens:
        return None
    room = mask.shape[-1] - tokens
    queries = mask[:, 0].expand(-1, tokens, -1) if mask.shape[-2] == 1 else mask[:, 0, -tokens:]
    if isinstance(past, Tensor):
        queries, past = queries.index_select(-1, _places(past, tokens, room)), 0
    seen_by = queries[:, back:].diagonal(min(past, room), dim1=-2, dim2=-1)
    return _visible(seen_by[:, : tokens - back])


def _visible(mask: Tensor) -> Tensor:
    """A mask as bool. What is added to hide a token is -1e4 or less, by whoever made it."""
    return mask > -1e3 if mask.is_floating_point() else mask.bool()


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def unlabelled(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """True on the tokens without a label (batch, tokens); None unless labels and input have the same tokens."""
    ids, labels = arguments.get("input_ids"), arguments.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return None
    return None if is_encoder_decoder(model) else labels == -100


def leading(count: Past, arguments: Mapping[str, Any]) -> Tensor | None:
    """True on the first `count` tokens of each row (batch, tokens); None where that is all, or no tokens are seen."""
    value = next((arguments[name] for name in _TOKENS if isinstance(arguments.get(name), Tensor)), None)
    if value is None or value.dim() < 2 or (isinstance(count, int) and count >= value.shape[1]):
        return None
    return (torch.arange(value.shape[1], device=value.device) < count).expand(value.shape[:2])


def given(prompt: Tensor | None, mask: Tensor | None, sequences: Tensor | None, *, labels: bool) -> Tensor | None:
    """The real tokens that were given. By `labels`: where every token of a sequence has one, all are."""
    if prompt is None:
        return None
    found = prompt if mask is None else prompt & mask
    if not labels:
        return found
    some = found.any(dim=-1, keepdim=True)
    if sequences is not None:
        counts = torch.zeros(found.numel(), dtype=torch.int, device=found.device)
        some = counts.index_add(0, sequences.flatten(), found.flatten().int()).bool()[sequences]
    return torch.where(some, found, torch.ones_like(found) if mask is None else mask)


def packed_sequences(arguments: Mapping[str, Any], *, training: bool) -> Tensor | None:
    """Index of the sequence each token belongs to, when several share a row; None otherwise.

    Rows packed without restarting positions or a mask that tells ("wrapped" packing) have no boundaries to find. One
    sequence a row is None, save where it would take a look at the values in training.
    """
    mask, positions, tokens = arguments.get("attention_mask"), arguments.get("position_ids"), num_tokens(arguments)
    prepared = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
    if isinstance(arguments.get("seq_idx"), Tensor):
        seq_idx: Tensor = arguments["seq_idx"]
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif prepared and tokens is not None and tokens > 1:
        past = _known(past_length(arguments))
        real, apart = two_d(mask, tokens, past), _allowed(mask, tokens, past, 1)
        if real is None or apart is None:
            return None
        starts = torch.ones_like(real)
        starts[:, 1:] = real[:, 1:] & real[:, :-1] & ~apart
    elif isinstance(positions, Tensor) and positions.dim() == 2 and mask is None and (training or tokens != 1):
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] - positions[:, :-1] != 1
    else:
        return None
    alone = prepared or not training
    if alone and not torch.compiler.is_compiling() and not bool(starts[:, 1:].any()):
        return None
    return starts.flatten().cumsum(0).view_as(starts) - 1


def _known(past: Past | None) -> Past:
    return 0 if past is None else past


def seen(mask: Any, length: Past) -> Tensor | None:
    """Which of the first `length` tokens are real (batch, length), those in the cache included; None where all are.

    Of a length that is a tensor, for all tokens that the mask has room for.
    """
    mask = _entry(mask)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    if isinstance(length, Tensor):
        return _visible(last) & (torch.arange(last.shape[-1], device=last.device) < length)
    return None if last.shape[-1] < length else _visible(last[:, :length])


def view_of(
    arguments: Mapping[str, Any], *, training: bool, tokens: int | None, prompt: int = 1
) -> tuple[StackView, StackView]:
    """What a stack was told of its own tokens, and of the encoder's (for cross-attention).

    Args:
        tokens: a row of the model's. A stack with as many has its own in the KV cache; or a decoder beside an encoder.
        prompt: of a decoder's tokens, how many are given.
    """
    own, mask = num_tokens(arguments), arguments.get("attention_mask")
    states = arguments.get("encoder_hidden_states")
    decoder = isinstance(states, Tensor)
    past = _known(past_length(arguments))
    real, rows = two_d(mask, own, past), num_rows(arguments)
    if real is not None and rows is not None and len(real) == 1:
        real = real.expand(rows, -1)
    view = StackView(real, packed_sequences(arguments, training=training), own)
    view.past = past
    view.seen = seen(mask, past + (own or 0))
    view.cached = decoder or (own is not None and own == tokens)
    if decoder:
        view.prompt = leading(prompt - past, arguments)
    length = states.shape[1] if isinstance(states, Tensor) else None
    return view, StackView(two_d(arguments.get("encoder_attention_mask"), length), tokens=length)
