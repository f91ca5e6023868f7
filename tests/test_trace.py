"""RoutingTrace: what it counts, and that it counts what the model really did."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic
from moesaic.errors import TrainingError
from moesaic.host import TARGETS
from moesaic.routing import Record, Routing, RoutingTrace, Site, TopK
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
        names=["known", "by name"],
    )
    assert {layer: row.tolist() for layer, row in trace.by_layer().items()} == {0: [0.5, 0.5], 1: [1.0, 0.0]}


def test_experts_that_only_share_a_number_are_aligned_before_they_are_averaged() -> None:
    """Modules that tell two tasks apart perfectly, each with other numbers: an average over numbers shows nothing."""
    trace = traced(
        record([[[1.0, 0, 0]], [[0, 1.0, 0]]], name="x", layer=0, tasks=[0, 1]),
        record([[[0, 0, 1.0]], [[1.0, 0, 0]]], name="y", layer=0, tasks=[0, 1]),
        record([[[0, 1.0, 0]], [[0, 0, 1.0]]], name="z", layer=1, tasks=[0, 1]),
    )
    apart = {0: [1.0, 0.0, 0.0], 1: [0.0, 1.0, 0.0]}
    assert {task: row.tolist() for task, row in trace.by_task().items()} == apart
    rows = {n: {t: row.tolist() for t, row in tasks.items()} for n, tasks in trace.by_layer_and_task().items()}
    assert rows == {0: apart, 1: apart}
    assert trace.by_layer()[0].tolist() == [0.5, 0.5, 0.0]
    assert trace.mutual_information() == pytest.approx(1.0, abs=1e-6)
    assert all(sorted(order.tolist()) == [0, 1, 2] for order in trace.aligned().values())


def naive(records: list[Record]) -> dict[str, Any]:
    """All figures of modules with routers of E experts each, one token at a time, in plain Python floats."""
    modules: dict[str, dict[str, Any]] = {}
    for r in records:
        m = modules.setdefault(r.site.name, {"w": [], "p": [], "task": [], "layer": r.site.layer})
        for row in range(r.routing.weights.shape[0]):
            for token in range(r.routing.weights.shape[1]):
                if r.mask is None or r.mask[row, token]:
                    m["w"].append(r.routing.weights[row, token].tolist())
                    m["p"].append(r.routing.probs[row, token].tolist())
                    m["task"].append(None if r.task_ids is None else int(r.task_ids[row]))

    def information(pairs: list[tuple[int, int]]) -> float:
        joint, left, right = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
        n = len(pairs)
        return sum(c / n * math.log2(c * n / (left[a] * right[b])) for (a, b), c in joint.items())

    inner, outer, entropies, shares = [], [], [], {}
    for name, m in modules.items():
        num_experts = len(m["w"][0])
        share = [sum(w[e] for w in m["w"]) for e in range(num_experts)]
        shares[name] = [s / sum(share) for s in share]
        entropies.append(
            -sum(p * math.log(p) for row in m["p"] for p in row if p) / len(m["p"]) / math.log(num_experts)
        )
        inner.append(sum(math.log(sorted(p)[-1] / sorted(p)[-2]) for p in m["p"]) / len(m["p"]))
        variance = sum((s - 1 / num_experts) ** 2 for s in shares[name]) / num_experts
        outer.append(math.sqrt(variance) * num_experts)
    ordered = sorted(modules.values(), key=lambda m: m["layer"])
    tops = [[max(range(len(w)), key=w.__getitem__) for w in m["w"]] for m in ordered]
    return {
        "utilisation": shares,
        "entropy": sum(entropies) / len(entropies),
        "inner_balance": math.exp(sum(inner) / len(inner)),
        "outer_balance": sum(outer) / len(outer),
        "layer_information": sum(information(list(zip(a, b, strict=True))) for a, b in pairwise(tops))
        / (len(tops) - 1),
        "by_layer_and_task": {
            str(m["layer"]): {
                str(task): [
                    sum(w[e] for w, t in zip(m["w"], m["task"], strict=True) if t == task) / m["task"].count(task)
                    for e in range(len(m["w"][0]))
                ]
                for task in sorted(set(m["task"]))
            }
            for m in modules.values()
        },
    }


def drawn(layers: int, experts: list[int], *, seed: int, dtype: torch.dtype = torch.float64) -> list[Record]:
    """Records of top-2 routers over two rows of five tokens, the last two of the second row padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    made = []
    for layer in range(layers):
        logits = torch.randn(2, 5, experts[layer % len(experts)], generator=generator, dtype=dtype)
        logits[~mask] = torch.nan
        site = Site(f"model.layers.{layer}.mlp", 2, 2, layer=layer, num_layers=layers)
        made.append(Record(site, TopK(2)(logits), mask=mask, task_ids=torch.tensor([4, 7])))
    return made


@pytest.mark.parametrize("experts", [[4], [2, 4, 6]])
def test_every_figure_equals_a_plain_loop_over_tokens(experts: list[int]) -> None:
    forwards = [drawn(3, experts, seed=seed) for seed in range(3)]
    trace = RoutingTrace(names=["named: as they are"])
    for records in forwards:
        trace.update(records)
    expected, found = naive([r for records in forwards for r in records]), trace.to_dict()
    for key, value in expected.items():
        flat_found, flat_expected = numbers(found[key]), numbers(value)
        assert flat_found == pytest.approx(flat_expected, abs=1e-7), key
    assert trace.entropy_by_layer().keys() == {0, 1, 2}
    assert sum(trace.entropy_by_layer().values()) / 3 == pytest.approx(expected["entropy"], abs=1e-7)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for key in value for n in numbers(value[key])]
    return [n for v in value for n in numbers(v)] if isinstance(value, list) else [value]


def test_inner_balance_is_the_geometric_mean_of_first_over_second() -> None:
    assert traced(record([[0.8, 0.2, 0.0], [0.4, 0.4, 0.2]])).inner_balance() == pytest.approx(2.0)
    assert traced(record([[1.0, 0.0], [0.8, 0.2]])).inner_balance() == pytest.approx(4.0), "no second: left out"
    assert traced(record([[1.0, 0.0]])).inner_balance() is None
    assert traced(record([[1.0]])).inner_balance() is None
    assert traced(record([[1.0, 1e-20]])).inner_balance() == pytest.approx(1e6)


def test_outer_balance_is_zero_when_balanced_and_largest_when_collapsed() -> None:
    assert traced(record([*ONE_HOT[:1], [[0, 0, 1.0, 0], [0, 0, 0, 1.0]]])).outer_balance() == pytest.approx(0)
    assert traced(record([[0, 1.0, 0, 0]])).outer_balance() == pytest.approx(math.sqrt(3))
    assert traced(record([[1.0]])).outer_balance() is None


def test_layer_information_is_two_bits_when_four_experts_are_passed_on_and_none_when_all_is_mixed() -> None:
    eye = torch.eye(4)[None]
    below = record(eye, name="model.layers.0.mlp")

    def above(weights: Any, name: str = "model.layers.1.mlp") -> RoutingTrace:
        trace = RoutingTrace()
        trace.update([below, record(weights, name=name, layer=1)])
        return trace

    assert above(eye).layer_information() == pytest.approx(2.0)
    assert above(eye.flip(1)).layer_information() == pytest.approx(2.0), "expert indices need not agree"
    assert above(torch.eye(4)[[0, 0, 0, 0]][None]).layer_information() == pytest.approx(0.0, abs=1e-9)
    assert above(torch.eye(4)[[0, 0, 1, 1]][None]).layer_information() == pytest.approx(1.0)
    assert above(eye, name="model.layers.1.attention").layer_information() is None, "another kind of module"


def test_layer_information_adds_up_over_forwards_and_leaves_padding_out() -> None:
    trace = RoutingTrace()
    for expert in range(2):
        rows = torch.eye(2)[[expert, 1 - expert]][None]
        mask = [[True, False]]
        trace.update([record(rows, name=f"layers.{i}.q", layer=i, mask=mask) for i in range(2)])
    assert trace.layer_information() == pytest.approx(1.0)


def test_work_does_not_grow_with_the_number_of_routers() -> None:
    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(layers: int) -> int:
        records, trace, Counting.calls = drawn(layers, [4], seed=0), RoutingTrace(), 0
        for r in records:  # a view a record is all that may grow
            r.routing = Routing(*(t.detach() for t in (r.routing.weights, r.routing.probs, r.routing.logits)))
        with Counting():
            trace.update(records)
        return Counting.calls

    views_a_router = (calls(30) - calls(10)) / 20
    assert views_a_router <= 2, "flatten the weights, flatten the probabilities"


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
    assert len(trace.modules) == sum("default" in m.moe_lora_router for m in tiny.mixtures(model).values()) > 0
    for name, module in trace.modules.items():
        assert module.tokens == 3 * 7 - 2
        torch.testing.assert_close(module.utilisation.sum(), torch.tensor(1.0, dtype=torch.float64))
        (kept,) = trace.weights(name)
        counted = kept[inputs["attention_mask"].bool()].double().abs().sum(0)
        torch.testing.assert_close(module.weight, counted, rtol=1e-6, atol=1e-6)  # one forward is summed in float32
    assert set(trace.by_task()) == {0, 1}
    assert trace.mutual_information() is not None
    json.dumps(trace.to_dict())


def test_a_trace_counts_prefill_and_decoding_of_generate(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, labels=False)
    inputs.pop(TARGETS, None)  # for losses alone; `generate` knows its arguments
    with moesaic.trace(model) as trace, moesaic.routing_tasks(model, task_ids=[0, 1, 1]):
        out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (3, 11)
    assert {module.tokens for module in trace.modules.values()} == {3 * (7 + 3)}


def test_a_closed_trace_counts_no_more_and_does_not_change_the_output(method: str) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    inputs = tiny.batch(model, labels=False)
    with torch.no_grad(), moesaic.routing_tasks(model, task_ids=[0, 1, 1]):
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
    assert "1 of 4 experts dead" in repr(traced(record([[0.4, 0.3, 0.3, 0.0]] * 80)))
    assert "dead" not in repr(traced(record([[0.4, 0.3, 0.3, 0.0]] * 8)))
