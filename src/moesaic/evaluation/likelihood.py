"""Log-likelihoods of answers, for many answers to one prompt.

A prompt is read once, and its KV cache is shared by the answers to it: of four choices of five tokens behind sixty, two
thirds of the work is saved. Where a model keeps no such cache, or does not take positions, and where a row has to be
cut, each answer is read behind a prompt of its own.
"""

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.data import causal
from moesaic.data.examples import Example
from moesaic.training.prepared import Prepared

logger = logging.getLogger(__name__)

Ids = Sequence[int]


def likelihoods(
    prepared: Prepared, batch: Sequence[Example], prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]
) -> list[list[float]]:
    """Summed log-probabilities of each prompt's answers, given it.

    Args:
        batch: the rows, for methods that are told of a prompt as a whole.
        prompts, answers: their tokens.
    """
    longest = max(len(p) + max(map(len, found)) for p, found in zip(prompts, answers, strict=True))
    if longest > prepared.max_length:
        _say_cut(batch[0].task, prepared.max_length)
    owners = torch.tensor([i for i, found in enumerate(answers) for _ in found])
    flat = [list(answer) for found in answers for answer in found]
    totals = None
    if longest <= prepared.max_length and min(map(len, prompts)) > 0:
        totals = _behind_caches(prepared, batch, prompts, flat, owners)
    if totals is None:
        totals = _each_alone(prepared, batch, prompts, flat, owners)
    each = iter(totals.tolist())
    return [[next(each) for _ in found] for found in answers]


@cache
def _say_cut(task: str, max_length: int) -> None:
    logger.warning(
        "task '%s': some prompts with their choices are longer than max_length=%d tokens, and are cut at their start",
        task, max_length,
    )  # fmt: skip


def prompts_known(prepared: Prepared, batch: Sequence[Example]) -> AbstractContextManager[Any]:
    """Tell a mixture that routes by prompts those of a batch's rows."""
    scores = None
    if prepared.routed:
        scores = prepared.model.peft_config["default"].scores([causal.question(e) for e in batch])
    if scores is None:
        return nullcontext()
    from moesaic.host import routing_scores

    return routing_scores(prepared.model, scores.to(prepared.device))


def _each_alone(
    prepared: Prepared, batch: Sequence[Example], prompts: Sequence[Ids], answers: list[list[int]], owners: Tensor
) -> Tensor:
    rows = []
    for owner, answer in zip(owners.tolist(), answers, strict=True):
        ids, learned = [*prompts[owner], *answer], [causal.IGNORED] * len(prompts[owner]) + answer
        kept = causal.fitting(learned, prepared.max_length)
        rows.append({"input_ids": ids[kept], "labels": learned[kept]})
    collate = causal.CausalCollator(prepared.base.tokenizer.pad_token_id, positions=prepared.base.positions)
    inputs = {k: v.to(prepared.device) for k, v in collate(rows).items()}
    labels = inputs["labels"][:, 1:]
    with prompts_known(prepared, [batch[i] for i in owners.tolist()]):
        return _summed(prepared.model(**inputs).logits[:, :-1], labels)


def _behind_caches(
    prepared: Prepared, batch: Sequence[Example], prompts: Sequence[Ids], answers: list[list[int]], owners: Tensor
) -> Tensor | None:
    """None for a model that cannot do it."""
    cache = _cache_of(prepared)
    if cache is None:
        return None
    device, positions = prepared.device, prepared.base.positions
    given, real = _padded(prepared, prompts, positions)
    lengths = real.sum(1)
    with ExitStack() as known:
        if prepared.routed:
            from moesaic.host import routing_prompt_length

            known.enter_context(routing_prompt_length(prepared.model, given.shape[1]))
        places = torch.arange(given.shape[1], device=device).expand_as(given)
        with prompts_known(prepared, batch):
            out = prepared.model(
                input_ids=given, attention_mask=real, position_ids=places, past_key_values=cache, use_cache=True
            )
        first = out.logits[torch.arange(len(given)), lengths - 1].float().log_softmax(-1)
        owners = owners.to(device)
        totals = first[owners, torch.tensor([answer[0] for answer in answers], device=device)]
        read, said = _padded(prepared, [answer[:-1] for answer in answers], None)
        if not read.shape[1]:
            return totals
        cache.batch_select_indices(owners)
        places = lengths[owners, None] + torch.arange(read.shape[1], device=device)
        if positions is not None:
            places = places.clamp(max=positions - 1)
        with prompts_known(prepared, [batch[i] for i in owners.tolist()]):
            out = prepared.model(
                input_ids=read,
                attention_mask=torch.cat([real[owners], said], dim=1),
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
    labels = torch.full_like(read, causal.IGNORED)
    for row, answer in zip(labels, answers, strict=True):
        row[: len(answer) - 1] = torch.tensor(answer[1:])
    return totals + _summed(out.logits, labels)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels (rows, tokens), summed over each row's."""
    answered = labels != causal.IGNORED
    gained = torch.zeros(labels.shape, device=labels.device)
    gained[answered] = -F.cross_entropy(logits[answered].float(), labels[answered], reduction="none")
    return gained.sum(1)


def _padded(prepared: Prepared, rows: Sequence[Ids], positions: int | None) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, and which of their tokens are real, both (rows, tokens)."""
    longest = max(map(len, rows))
    longest = causal.round_up(longest, positions) if longest else 0
    filler = prepared.base.tokenizer.pad_token_id
    ids = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
    return ids.to(prepared.device), mask.to(prepared.device)


def _cache_of(prepared: Prepared) -> Any:
    """An empty cache that keeps every token's keys and values, so that its rows can be shared out; None if it cannot.

    Told of the model beforehand: a forward in vain would cost its time, and be counted by whoever traces.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    model = prepared.base.model
    if not {"position_ids", "past_key_values"} <= inspect.signature(model.forward).parameters.keys():
        return None
    if prepared.base.counts_from_padding or "local" in getattr(model.config, "attention_layers", ()):
        return None  # positions, or a window, that count padding
    cache = DynamicCache(config=model.config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None
