"""One thread a test process, sums that do not depend on where a tensor lies, and the registered methods."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# MKL rounds by the address a tensor begins at, unless told: a loaded model could differ in its last bit.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import torch
from hypothesis import settings

from moesaic.lora import crossover
from moesaic.models import precision

torch.set_num_threads(1)
settings.register_profile("moesaic", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("moesaic")


@pytest.fixture(scope="session", autouse=True)
def plain_numbers() -> Iterator[None]:
    """Tests compare numbers: what asks for no precision has float32 on every processor, and none is measured."""
    pays = precision.bf16_pays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "bf16_pays", lambda device: device.type != "cpu" and pays(device))
        patch.setattr(crossover, "_asked", {"cpu", "cuda"})
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for each method registered when tests are collected.

    Those of the contract also run for some recombinations.
    """
    given = {name for names in _parametrized(metafunc.definition) for name in names}
    if "method" in metafunc.fixturenames and "method" not in given:
        from moesaic.lora import METHODS
        from tests.tiny import COMBINATIONS

        contract = metafunc.module.__name__.endswith("test_contract")
        metafunc.parametrize("method", [*sorted(METHODS), *(COMBINATIONS if contract else ())])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests over methods and something else, the default run has each method and each something once.

    The rest of the product only repeats what is told, and is run with `-m slow`. Parameters that
    `@pytest.mark.full("name", …)` names are not thinned out: each of their values is a fact of its own.
    """
    groups: dict[tuple[Any, ...], list[tuple[pytest.Item, list[str]]]] = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "method" not in params:
            continue
        axes = _parametrized(item)
        axes += [] if ("method",) in axes else [("method",)]
        full = [name for mark in item.iter_markers("full") for name in mark.args]
        values = {axis: repr([params[name] for name in axis]) for axis in axes}
        whole = [values.pop(axis) for axis in axes if set(axis) & set(full)]
        function = item.nodeid.partition("[")[0]
        groups.setdefault((function, *whole), []).append((item, list(values.values())))
    for group in groups.values():
        columns = [list(dict.fromkeys(column)) for column in zip(*(values for _, values in group), strict=True)]
        turns = range(max(map(len, columns)))
        diagonal = {tuple(column[turn % len(column)] for column in columns) for turn in turns}
        for item, values in group:
            if tuple(values) not in diagonal:
                item.add_marker(pytest.mark.slow)


def _parametrized(item: Any) -> list[tuple[str, ...]]:
    """The names that each `parametrize` of a test gives values to."""
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    return [tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names) for names in marks]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
