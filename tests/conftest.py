"""One thread a test process, and the registered methods as a parameter."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("moesaic", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("moesaic")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for each method registered when tests are collected.

    Those of the contract also run for some recombinations.
    """
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    given = {name.strip() for names in marks for name in (names.split(",") if isinstance(names, str) else names)}
    if "method" in metafunc.fixturenames and "method" not in given:
        from moesaic.lora import METHODS
        from tests.tiny import COMBINATIONS

        contract = metafunc.module.__name__.endswith("test_contract")
        metafunc.parametrize("method", [*sorted(METHODS), *(COMBINATIONS if contract else ())])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
