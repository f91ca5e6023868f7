"""Where the prompt ends, from who knows it: `generate`, which is told the prompt and then calls the model many times.

Without a cache every call reads prompt and answer anew; with guesses (prompt lookup, assistants) a call has several of
an answer's tokens; in chunks a call has part of the prompt. The model alone cannot tell these apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.host.masks import parts_of
from moesaic.host.prompts import Prompt


class Telling(Protocol):
    """Whoever is told the prompt."""

    told: Any
    traces: Any
    pinned_tasks: Any
    pinned_scores: Any
    differing: Callable[[], list[str]]
    asks: Callable[[str], bool]
    batched: frozenset[tuple[int, ...]]

    def warn_once(self, message: str) -> None: ...


def tell(model: nn.Module, host: Telling) -> None:
    """Have `model.generate` tell `host` what the prompt is. Attributes of this model: its class stays as it is."""
    for name, through in _THROUGH.items():
        if callable(getattr(model, name, None)):
            setattr(model, name, partial(through, model, host, vars(model).get(name)))


def untell(model: nn.Module) -> None:
    for name, through in _THROUGH.items():
        found = vars(model).get(name)
        if isinstance(found, partial) and found.func is through:
            own = found.args[2]
            delattr(model, name)
            if own is not None:
                setattr(model, name, own)


def _generate(model: Any, host: Telling, own: Any, *args: Any, **kwargs: Any) -> Any:
    call = own or partial(type(model).generate, model)
    outer, inner = host.told, _prompt(model, args[0] if args else kwargs.get("inputs"), kwargs)
    if outer is not None and outer.begins(inner.ids, 0):  # a model that is its own assistant goes on from the prompt
        return call(*args, **kwargs)
    host.told = inner
    try:
        return call(*args, **kwargs)
    finally:
        host.told = outer


def _generate_batch(model: Any, host: Telling, own: Any, *args: Any, **kwargs: Any) -> Any:
    call = own or partial(type(model).generate_batch, model)
    if host.pinned_tasks is not None or host.pinned_scores is not None or host.traces:
        raise ConfigError(
            "generate_batch answers in a thread of its own, where routing_tasks, routing_prompts and trace are not "
            "seen: use generate"
        )
    if host.asks("by_task"):
        raise ConfigError("generate_batch cannot be told task ids, which this method routes by: use generate")
    if model.training and host.differing():
        host.warn_once(
            f"generate_batch answers in evaluation, where {', '.join(host.differing())} mixes by another gate than in "
            "training: what is trained on these answers is off-policy. Let the trainer use generate"
        )
    if not host.asks("by_prompt"):
        return call(*args, **kwargs)
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    if (getattr(config, "num_return_sequences", None) or 1) > 1:
        raise ConfigError(
            "generate_batch copies pages for num_return_sequences, where routing by the prompt is lost: repeat "
            "the prompts"
        )
    given = args[0] if args else kwargs.get("inputs", ())
    host.batched = frozenset(tuple(int(i) for i in row) for row in given)
    try:
        return call(*args, **kwargs)
    finally:
        host.batched = frozenset()


_THROUGH = {"generate": _generate, "generate_batch": _generate_batch}


def _prompt(model: Any, inputs: Any, kwargs: dict[str, Any]) -> Prompt:
    if getattr(model.config, "is_encoder_decoder", False):
        inputs, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    else:
        inputs, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
    embeds = kwargs.get("inputs_embeds")
    ids = inputs if isinstance(inputs, Tensor) and inputs.dim() == 2 else None
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    lengths = [found.shape[1] for found in (ids, embeds, mask) if isinstance(found, Tensor) and found.dim() > 1]
    whole = ids is not None and (mask is None or mask.shape == ids.shape)
    parts = parts_of(model, {**kwargs, "input_ids": ids})
    return Prompt(max(lengths, default=1), ids if whole else None, None if mask is None else mask.bool(), parts)
