"""In whatever order programs import moesaic, PEFT, Transformers and TRL, and ask where they are: a mixture loads."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from peft import get_peft_model

import moesaic
from moesaic.models.embedded import load_model
from tests.tiny_folders import save_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

NAMES = ("moesaic", "peft", "transformers", "trl")
WALK = """
import importlib, importlib.util, os, sys, traceback
import accelerate, datasets, torch, sklearn  # what takes long, and imports nothing of what is put in order

def imported(name):
    for other in NAMES:
        importlib.util.find_spec(other)  # as Transformers does
    importlib.import_module({"trl": "trl.trainer.sft_trainer", "lm_eval": "lm_eval.models.huggingface"}.get(name, name))

def load():
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, pipeline
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "mixture")
    AutoPeftModelForCausalLM.from_pretrained("mixture")
    pipeline("text-generation", "mixture", max_new_tokens=2)("first 1 2 :")

def walk(done, left):
    "A process for each order; those that begin alike share it until they part."
    if left == {()}:
        load()
        print("loaded", *done, flush=True)
        return
    for name in sorted({order[0] for order in left}):
        child = os.fork()
        if not child:
            try:
                imported(name)
                walk((*done, name), {order[1:] for order in left if order[0] == name})
            except BaseException:
                print("failed", *done, name, flush=True)
                traceback.print_exc()
            os._exit(0)
        os.waitpid(child, 0)

NAMES = sys.argv[1].split(",")
assert not {*NAMES} & {*sys.modules}
walk((), {tuple(order.split(",")) for order in sys.argv[2:]})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imports")
    base = load_model(str(save_model(root / "base", "causal")))
    config = moesaic.MoLAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base.model, config).save_pretrained(str(root / "mixture"))
    base.tokenizer.save_pretrained(root / "mixture")
    return root


def check(place: Path, names: tuple[str, ...], orders: list[tuple[str, ...]]) -> None:
    command = [sys.executable, "-c", WALK, ",".join(names), *map(",".join, orders)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=590, check=False)
    said = sorted(line for line in done.stdout.splitlines() if line.startswith(("loaded", "failed")))
    assert said == sorted(" ".join(("loaded", *order)) for order in orders), done.stderr[-3000:]


def test_a_mixture_loads_with_moesaic_imported_before_peft_and_after_it(place: Path) -> None:
    every, drawn = list(permutations(NAMES)), random.Random(0)
    before = [order for order in every if order[0] == "moesaic"]
    after = [order for order in every if order.index("moesaic") > order.index("peft")]
    check(place, NAMES, [drawn.choice(before), drawn.choice(after)])


@pytest.mark.slow
@pytest.mark.parametrize("first", NAMES)
def test_a_mixture_loads_in_every_order_of_imports(place: Path, first: str) -> None:
    check(place, NAMES, [order for order in permutations(NAMES) if order[0] == first])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_mixture_loads_wherever_lm_eval_is_imported(place: Path) -> None:
    names = (*NAMES, "lm_eval")
    check(place, names, random.Random(0).sample(list(permutations(names)), 6))
