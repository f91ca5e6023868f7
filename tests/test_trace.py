"""RoutingTrace: what it counts, and that it counts what the model really did."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import moesaic
from moesaic.errors import TrainingError
from moesaic.routing import Record, Routing, RoutingTrace, Site
from tests import tiny


def record(weights: Any, *, name: str = "a", layer: int = 0, mask: Any = None, tasks: Any = None) -> Record:
    w = torch.as_tensor(weights, dtype=torch.float32)
    mask = None if mask is None else torch.as_tensor(mask, dtype=torch.bool)
    tasks = None if tasks is None else torch.as_tensor(tasks)
    return Record(Site(name, 2, 2, layer=layer, num_layers=2), Routing(w, w, w), mask=mask, task_ids=tasks)


def traced(*records: Record, **kwargs: Any) -> RoutingTrace:
    trace = RoutingTrace(**kwargs)
    for r in records:
        trace.update([r])
    return trace


ONE_HOT = [[[1.0, 0, 0, 0], [0, 1.0, 0, 0]], [[0, 0, 1.0, 0], [1.0, 0, 0, 0]]]


def test_utilisation_and_selection_count_tokens() -> None:
    trace = traced(record(ONE_HOT))
    assert trace.utilisation()["a"].tolist() == [0.5, 0.25, 0.25, 0.0]
    assert trace.modules["a"].selection.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert trace.modules["a"].tokens == 4


def test_utilisation_is_weighed_and_selection_is_not() -> None:
    trace = traced(record([[0.9, 0.1, 0.0]]))
    torch.testing.assert_close(
        trace.utilisation()["a"], torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64), atol=1e-7, rtol=0
    )
    assert trace.modules["a"].selection.tolist() == [1.0, 1.0, 0.0]


def test_forwards_add_up() -> None:
    first, second = record(ONE_HOT[:1]), record(ONE_HOT[1:])
    assert torch.equal(traced(first, second).utilisation()["a"], traced(record(ONE_HOT)).utilisation()["a"])


def test_padding_is_not_counted() -> None:
    trace = traced(record(ONE_HOT, mask=[[True, False], [True, True]], tasks=[0, 1]))
    assert trace.modules["a"].tokens == 3
    assert trace.utilisation()["a"].tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert trace.by_task()[0].tolist() == [1.0, 0, 0, 0]


def test_entropy_is_zero_when_certain_and_one_when_uniform() -> None:
    assert traced(record(ONE_HOT)).entropy() == pytest.approx(0, abs=1e-6)
    assert traced(record([[0.25] * 4])).entropy() == pytest.approx(1, abs=1e-6)
    assert traced(record([[0.5, 0.5, 0, 0]])).entropy() == pytest.approx(math.log(2) / math.log(4), abs=1e-6)


def test_dead_experts_are_those_far_below_the_fair_share() -> None:
    trace = traced(record([[0.60, 0.35, 0.05, 0.0]]))
    assert trace.dead_experts() == [("a", 3)]
    assert trace.dead_experts(threshold=0.5) == [("a", 2), ("a", 3)]


def test_mutual_information_is_one_for_tasks_with_experts_of_their_own() -> None:
    own = [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert traced(record(own, tasks=[5, 9])).mutual_information() == pytest.approx(1.0, abs=1e-6)
    same = [[[0.5, 0.5]], [[0.5, 0.5]]]
    assert traced(record(same, tasks=[5, 9])).mutual_information() == pytest.approx(0.0, abs=1e-6)
    assert traced(record(own)).mutual_information() is None
    assert traced(record(own, tasks=[3, 3])).mutual_information() is None


def test_tasks_weigh_the_same_whatever_their_length() -> None:
    rows = [[[1.0, 0.0]]] * 9 + [[[0.0, 1.0]]]
    assert traced(record(rows, tasks=[0] * 9 + [1])).mutual_information() == pytest.approx(1.0, abs=1e-6)


def test_layers_average_their_modules() -> None:
    trace = traced(
        record([[1.0, 0.0]], name="x", layer=0),
        record([[0.0, 1.0]], name="y", layer=0),
        record([[1.0, 0.0]], name="z", layer=1),
    )
    assert {layer: row.tolist() for layer, row in trace.by_layer().items()} == {0: [0.5, 0.5], 1: [1.0, 0.0]}


def test_an_empty_trace_answers() -> None:
    trace = RoutingTrace()
    assert trace.utilisation() == {}
    assert trace.dead_experts() == []
    assert trace.mutual_information() is None
    json.dumps(trace.to_dict())


def test_a_trace_of_a_model_counts_every_real_token_of_every_module(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, labels=False)
    inputs["attention_mask"][1, 5:] = 0
    with moesaic.trace(model, keep_weights=True) as trace, torch.no_grad():
        model(**inputs, routing_task_ids=torch.tensor([0, 1, 1]))
    assert len(trace.modules) == len(tiny.mixtures(model))
    for name, module in trace.modules.items():
        assert module.tokens == 3 * 7 - 2
        torch.testing.assert_close(module.utilisation.sum(), torch.tensor(1.0, dtype=torch.float64))
        (kept,) = trace.weights(name)
        counted = kept[inputs["attention_mask"].bool()].double().sum(0)
        torch.testing.assert_close(module.weight, counted)
    assert set(trace.by_task()) == {0, 1}
    assert trace.mutual_information() is not None
    json.dumps(trace.to_dict())


def test_a_trace_counts_prefill_and_decoding_of_generate(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, labels=False)
    with moesaic.trace(model) as trace:
        out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (3, 11)
    assert {module.tokens for module in trace.modules.values()} == {3 * (7 + 3)}


def test_a_closed_trace_counts_no_more_and_does_not_change_the_output(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, labels=False)
    with torch.no_grad():
        plain = model(**inputs).logits
        with moesaic.trace(model) as trace:
            watched = model(**inputs).logits
        before = trace.to_dict()
        model(**inputs)
    assert torch.equal(plain, watched)
    assert trace.to_dict() == before


def test_a_model_without_a_mixture_cannot_be_traced() -> None:
    with pytest.raises(TrainingError, match="no moesaic mixture"), moesaic.trace(tiny.llama()):
        pass


def test_a_trace_says_what_it_saw_and_when_it_saw_nothing():
    assert RoutingTrace().entropy() is None
    assert "nothing" in repr(RoutingTrace())
    assert "1 of 4 experts dead" in repr(traced(record([[0.4, 0.3, 0.3, 0.0]])))
