"""A mixture beside plain LoRA of the same total rank on SmolLM2-135M-Instruct: `python scripts/bench_smollm2.py`.

A training step is the one that `moesaic train` makes (TRL's loss on the labelled tokens, auxiliary losses, backward,
AdamW) on rows of 64 tokens, of which 8 are learned; decoding is `generate` with the cache. All seven linears are
adapted. Every arm has its turn in each round, on one thread; ratios are taken round by round. Peak memory is what steps
add to a fresh process. Writes results/bench-smollm2.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.bench import measure
from moesaic.models.precision import numerics

EXPERTS, RANK = 4, 8
ROWS, TOKENS, LEARNED = 8, 64, 8
PROMPT, NEW = 64, 32
ROUNDS = 8
ARMS = {
    "lora": [f"adapter.r={EXPERTS * RANK}"],
    "uniform": [],
    "mola": ["adapter.top_k=2"],
    "dynmole": [],
    "rmoe": [],
    "hotmoe": [],
}


def prepared(name: str) -> Any:
    """An arm as a run has it."""
    from moesaic.data.examples import Example
    from moesaic.runs.recipe import load_recipe
    from moesaic.training.prepared import prepare

    shape = [] if name == "lora" else [f"adapter.r={RANK}", f"adapter.num_experts={EXPERTS}"]
    settings = ["model=smollm2", "data=none", "adapter.target_modules=all-linear", "adapter.lora_dropout=0.0"]
    return prepare(load_recipe(name, [*settings, *shape, *ARMS[name]]), [Example("task", "p", "c")])


def training(made: Any, folder: Path) -> Callable[[], Any]:
    from moesaic.data.examples import Example
    from moesaic.runs.folder import RunFolder
    from moesaic.training.run import build_trainer
    from moesaic.training.trainer import labelled_alone

    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (ROWS, TOKENS)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (TOKENS - LEARNED) + row[-LEARNED:], "task": 0} for row in ids]
    trainer = build_trainer(made, [Example("task", "p", "c")] * ROWS, rows, RunFolder(folder), progress=False)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model).train()  # autocast is put on here

    def step() -> None:
        with labelled_alone():
            trainer.training_step(model, trainer.data_collator(rows), num_items_in_batch=torch.tensor(ROWS * LEARNED))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def decoding(made: Any, rows: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    ids, model = torch.randint(100, 40_000, (rows, PROMPT)), made.model

    def step() -> None:
        model.eval()
        with torch.no_grad(), numerics("auto").context():
            how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)

    return step


KINDS: dict[str, Callable[[Any, Path], Callable[[], Any]]] = {
    "training": training,
    "decoding": lambda made, folder: decoding(made, 1),
    "decoding, 16 rows": lambda made, folder: decoding(made, 16),
}


def peak(name: str, kind: str) -> float:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import bench_smollm2 as b; from pathlib import Path\n"
        "import tempfile; from moesaic.bench import measure\n"
        f"made, folder = b.prepared({name!r}), Path(tempfile.mkdtemp())\n"
        f"step = b.KINDS[{kind!r}](made, folder); step(); print(measure.peak_of(step))"
    )
    return measure.in_fresh_process(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of these; others are kept")
    parser.add_argument("--no-memory", action="store_true")
    given = parser.parse_args()
    measure.keep_freed_memory()
    torch.set_num_threads(1)
    plan = numerics("auto")
    file = Path("results/bench-smollm2.json")
    out: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    command = " ".join(["python", *sys.argv])
    out |= {
        "command": command if len(given.kinds) == len(KINDS) else f"{out['command']}`, then `{command}",
        "experts": EXPERTS, "rank": RANK, "rounds": given.rounds, "rows": ROWS, "tokens": TOKENS, "learned": LEARNED,
        "prompt": PROMPT, "new": NEW, "autocast": plan.autocast, "torch": torch.__version__, "threads": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        made = {name: prepared(name) for name in given.arms}
        for kind in given.kinds:
            make = KINDS[kind]
            steps = {name: make(arm, Path(scratch) / name) for name, arm in made.items()}
            seconds = measure.interleave(steps, given.rounds, progress=lambda done, of: None)
            out[kind] = measure.table(seconds, "lora")
            for name, values in seconds.items():
                out[kind][name]["seconds"] = statistics.median(values)
            print(kind, json.dumps(out[kind], indent=1), flush=True)
    del made, steps
    if not given.no_memory and measure.can_measure_memory():
        out["peak_memory_mib"] = {k: {name: peak(name, k) for name in given.arms} for k in ("training", "decoding")}
        print(json.dumps(out["peak_memory_mib"], indent=1))
    file.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
