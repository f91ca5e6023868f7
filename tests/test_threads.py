"""One model in several threads: a server's requests, and `nn.DataParallel`'s replicas."""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moesaic
from moesaic.host import find_host
from moesaic.lora import METHODS
from moesaic.routing import RoutingTrace
from tests import tiny


def requests(model: Any, number: int) -> list[dict[str, Tensor]]:
    """Batches that differ in all that a forward may keep: tokens, padding, task ids, scores."""
    config = model.peft_config["default"]
    made = []
    for i in range(number):
        inputs = tiny.batch(model, rows=2, tokens=12, seed=i, labels=False)
        inputs["attention_mask"][0, : i % 5] = 0
        made.append(inputs | keys(config, i))
    return made


def keys(config: Any, i: int) -> dict[str, Tensor]:
    """What a batch of two rows may say beside its tokens."""
    found = {"routing_task_ids": torch.tensor([i % 2, (i + 1) % 2])}
    if hasattr(config, "texts"):
        found["routing_scores"] = torch.rand(2, config.num_experts, generator=torch.Generator().manual_seed(i))
    return found


def in_threads(work: Callable[[int], None], number: int) -> list[BaseException]:
    """Run `work(i)` in as many threads; what they raised."""
    raised: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def serve(method: str, threads: int, rounds: int) -> None:
    model = tiny.wrap(tiny.llama(layers=3), tiny.small(method))
    find_host(model).pinned_scores = None
    batches = requests(model, threads)
    with torch.no_grad():
        alone = [model(**batch).logits for batch in batches]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(rounds):
                wrong.append(not torch.equal(model(**batches[i]).logits, alone[i]))

    assert not in_threads(work, threads)
    assert sum(wrong) == 0
    assert len(wrong) == threads * rounds


def test_threads_answer_as_one_would(method: str) -> None:
    serve(method, threads=4, rounds=6)


@pytest.mark.slow
def test_eight_threads_answer_as_one_would_for_long(method: str) -> None:
    serve(method, threads=8, rounds=50)


def test_what_is_opened_around_a_forward_is_its_threads_alone() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("moelora"))
    find_host(model).pinned_tasks = None
    inputs = tiny.batch(model, labels=False)
    alone = {}
    for task in range(4):
        with moesaic.routing_tasks(model, task_ids=[task] * 3), torch.no_grad():
            alone[task] = model(**inputs).logits
    traces: dict[int, RoutingTrace] = {}
    ready = threading.Barrier(4)

    def work(task: int) -> None:
        with moesaic.routing_tasks(model, task_ids=[task] * 3), moesaic.trace(model) as traces[task], torch.no_grad():
            ready.wait()
            for _ in range(task + 1):
                assert torch.equal(model(**inputs).logits, alone[task])

    assert not in_threads(work, 4)
    for task, trace in traces.items():
        assert {module.tokens for module in trace.modules.values()} == {21 * (task + 1)}
        assert trace.to_dict()["by_task"].keys() == {str(task)}


def replicas(model: nn.Module, number: int, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """As `nn.DataParallel` makes them, but on the CPU: parameters are copies that hand their gradients back."""
    replicating = importlib.import_module("torch.nn.parallel.replicate")
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, optional: device)
    return replicating.replicate(model, list(range(number)))


def step(model: Any, batch: dict[str, Tensor], loss_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("external", [False, True])
def test_a_step_of_replicas_is_the_mean_of_their_steps(
    method: str, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = {f.name: False for f in dataclasses.fields(METHODS[method]) if f.name.endswith("_window")}
    config = tiny.small(method, aux_weight=0.3, **windows)  # a window over a step's micro-batches is one process's
    if method not in tiny.FROM_SCRATCH and not config.kind.learns_routing:
        return
    model = tiny.wrap(tiny.llama(), config).train()
    halves = [tiny.batch(model, rows=2, tokens=6, seed=i) | keys(config, i) for i in range(2)]
    host = find_host(model)
    host.pinned_scores = None

    def plain(_: Any) -> Tensor:
        return torch.stack([model(**half).loss for half in halves]).mean()

    def parallel(_: Any) -> Tensor:
        copies, losses = replicas(model, 2, monkeypatch), {}
        host.external = external

        def work(i: int) -> None:
            losses[i] = copies[i](**halves[i]).loss

        raised = in_threads(work, 2)
        host.external = False
        assert not raised, raised
        aux = host.take_collected()
        return torch.stack([losses[0], losses[1]]).mean() + (0 if aux is None else aux)

    wanted, got = step(model, {}, plain), step(model, {}, parallel)
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
