"""What a mixture's routers do with one text: each expert's share, by token and by layer."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moesaic.data.causal import IGNORED, prompt_ids
from moesaic.data.examples import Example
from moesaic.errors import ConfigError, suggest
from moesaic.evaluation.answers import check_known
from moesaic.routing import paired
from moesaic.training.prepared import Prepared

logger = logging.getLogger(__name__)


def explain(
    prepared: Prepared, prompt: str, *, task: str = "", answer: int = 0, layer: int | None = None, module: str = ""
) -> dict[str, Any]:
    """What a run's routers do with a prompt.

    Args:
        answer: tokens that a language model is let answer.
        layer, module: see `routed`.

    Returns:
        prompt; answer: its text, without the prompt; None where it was not asked, or is no language model; and what
        `routed` says of the prompt.

    Raises:
        ConfigError: the run has no routers, or none of such a layer, module or task.
    """
    longest, positions = prepared.max_length, prepared.base.positions
    if positions is not None:
        answer = min(answer, positions // 2)
        longest = min(longest, positions - answer)
    check_routed(prepared)
    ids = read(prepared, prompt, longest).to(prepared.device)
    scores, text = prepared.model.peft_config["default"].scores([prompt]), None
    if answer and prepared.layout is None:
        with known(prepared, task, scores):
            written = prepared.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, do_sample=False
            )
        text = prepared.base.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    found = routed(prepared, ids, task=task, scores=scores, layer=layer, module=module)
    return {"prompt": prompt, "answer": text, **found}


def check_routed(prepared: Prepared) -> None:
    """Raise ConfigError where there is no routing to show."""
    if not prepared.routed:
        raise ConfigError(f"method {prepared.recipe.method} has no routers: there is nothing to inspect")


def routed(
    prepared: Prepared,
    ids: Tensor,
    *,
    answered: int = 0,
    task: str = "",
    scores: Tensor | None = None,
    layer: int | None = None,
    module: str = "",
) -> dict[str, Any]:
    """Where a text's tokens went.

    Args:
        ids: the tokens (1, T) of a prompt, with the answer's behind them.
        answered: how many of them are the answer's.
        scores: what the prompt says of the experts (1, E), for methods that ask; read off the prompt's tokens, as
            `generate` does, where None.
        layer: the modules of that layer alone. module: those whose names end so, or have it as a part.

    Experts that have names are the same in all modules. Others only share a number: before any average those of each
    module are put in the order of the first one's that answer the same tokens.

    Returns:
        experts: their names. tokens: those of `ids`. modules: those that are averaged. aligned: whether their experts
        were put in order. weights: each expert's mean share over tokens and modules (E,). by_layer: layer -> the same.
        by_token: the same by token (T, E). logits: the routers' mean scores (E,). floors: the cosine that each expert
        asks of a prompt (E,), None where none does. global_scores: what the prompt says (E,), and weighted_global what
        that adds to the logits; None for methods that do not ask.

    Raises:
        ConfigError: the run has no routers, or none of such a layer, module or task.
    """
    from moesaic.host import find_host

    check_routed(prepared)
    config = prepared.model.peft_config["default"]
    if scores is None:
        prompt = ids[0, : ids.shape[1] - answered].tolist()
        scores = config.scores([prepared.base.tokenizer.decode(prompt, skip_special_tokens=True)])
    seen = _Collector()
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if answered:
        inputs["labels"] = ids.clone()
        inputs["labels"][:, : ids.shape[1] - answered] = IGNORED
    model = prepared.model.base_model.model
    with known(prepared, task, scores) as stack:
        traces: list[Any] = find_host(prepared.model).traces
        traces.append(seen)
        stack.callback(traces.remove, seen)
        (model.encoder if prepared.layout is not None else model)(**inputs)
    number = config.num_experts
    records = _chosen(seen.records, layer, module)
    if len(records) == 1:
        number = records[0].routing.weights.shape[-1]
    records = [r for r in records if r.routing.weights.shape[-1] == number]
    if not records:
        raise ConfigError("the routers of this run have differing numbers of experts: they share no table")
    weights = torch.stack([r.routing.weights.reshape(-1, number) for r in records])
    logits = torch.stack([r.routing.logits.reshape(-1, number) for r in records])
    aligned = not config.experts and scores is None and len(records) > 1
    if aligned:
        order = _alike(weights)
        weights, logits = (torch.stack([v[:, o] for v, o in zip(x, order, strict=True)]) for x in (weights, logits))
    layers = sorted({r.site.layer for r in records})
    by_layer = {
        str(at): weights[[i for i, r in enumerate(records) if r.site.layer == at]].mean(dim=(0, 1)).tolist()
        for at in layers
    }
    weighed = getattr(records[0].router, "weighed", None)
    return {
        "method": config.method,
        "experts": list(config.experts or map(str, range(number))),
        "floors": getattr(config, "floors", None),
        "modules": [r.site.name for r in records],
        "aligned": aligned,
        "tokens": prepared.base.tokenizer.convert_ids_to_tokens(ids[0].tolist()),
        "weights": weights.mean(dim=(0, 1)).tolist(),
        "logits": logits.mean(dim=(0, 1)).tolist(),
        "global_scores": None if scores is None else scores[0].tolist(),
        "weighted_global": None if scores is None or weighed is None else weighed(scores)[0].tolist(),
        "by_layer": by_layer,
        "by_token": weights.mean(dim=0).tolist(),
    }


def _chosen(records: list[Any], layer: int | None, module: str) -> list[Any]:
    """Those of a layer and of modules of a name. Raises ConfigError where there are none."""
    layers = sorted({r.site.layer for r in records})
    if layer is not None and layer not in layers:
        raise ConfigError(f"layer={layer} has no router; those that have: {', '.join(map(str, layers))}")
    names = [r.site.name for r in records]
    whole = [r for r in records if module in ("", r.site.name) or r.site.name.endswith(f".{module}")]
    found = whole or [r for r in records if module in r.site.name]
    found = [r for r in found if layer in (None, r.site.layer)]
    if not found:
        raise ConfigError(f"module={module} is no routed module; {suggest(module, {n.split('.')[-1] for n in names})}")
    return found


def _alike(weights: Tensor) -> list[Tensor]:
    """For each of M modules' weights (M, T, E), its experts (E,) in the order of the first's that answer the same."""
    orders, seen = [], torch.zeros_like(weights[0], dtype=torch.float64)
    for number, own in enumerate(weights.double()):
        orders.append(paired(seen, own) if number else torch.arange(weights.shape[-1]))
        seen = seen + own[:, orders[-1]]
    return orders


def known(prepared: Prepared, task: str, scores: Tensor | None = None) -> ExitStack:
    """Within it no gradients are kept, and routers are told the task and what the prompt says, as far as they ask.

    Raises:
        ConfigError: no such task, or none where the method must be told.
    """
    from moesaic.host import routing_scores, routing_tasks

    check_known(prepared, [task] if task else [])
    if task and task not in prepared.tasks:
        raise ConfigError(f"no task '{task}' in this run; known: {', '.join(prepared.tasks)}")
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if task:
        stack.enter_context(routing_tasks(prepared.model, task_ids=[prepared.tasks.index(task)]))
    if scores is not None:
        stack.enter_context(routing_scores(prepared.model, scores.to(prepared.device)))
    return stack


def read(prepared: Prepared, prompt: str, longest: int) -> Tensor:
    """The prompt as training and evaluation read it (1, T): a causal model's is cut at its beginning."""
    tokenizer = prepared.base.tokenizer
    if prepared.layout is not None:
        ids = tokenizer(prompt, truncation=True, max_length=longest)["input_ids"]
        cut = len(ids) == longest
    else:
        (example,) = prepared.given([Example("", prompt)])
        whole = prompt_ids(example, tokenizer)
        ids, cut = whole[-longest:], len(whole) > longest
    if cut:
        logger.warning("the prompt may be cut: there is room for %d tokens", longest)
    return torch.tensor([ids])


class _Collector:
    """Stands where a trace does, and keeps the records as they are."""

    keep_weights = False

    def __init__(self) -> None:
        self.records: list[Any] = []

    def update(self, records: Sequence[Any]) -> None:
        self.records += records
