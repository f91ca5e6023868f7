"""Routers over frozen adapters beside PEFT's own, Arrow and X-LoRA: `python scripts/bench_adapters.py [ADAPTER …]`.

Eight LoRA adapters of rank 8 on a Llama of width 512 and 4 layers. Seconds are those of rounds in which every arm has
its turn, on one thread; ratios are taken round by round. Peak memory is what a forward of 512 tokens adds to a fresh
process. Prototype accuracy is |cos| to the first right singular vector of B A, over these adapters and those of the
folders that are named. Writes results/bench-adapters.json.
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
from peft import LoraConfig, get_peft_model
from torch import Tensor

from moesaic.bench import measure
from moesaic.bench.arms import VOCABULARY, llama
from moesaic.lora import METHODS
from moesaic.lora.store import Store

EXPERTS, RANK, WIDTH, LAYERS = 8, 8, 512, 4
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
PREFILL, PROMPT, NEW, ROUNDS = 512, 64, 16, 12
ARMS = ("base", "peft-arrow", "arrow", "x-lora", "phatgoose", "glider")


def base() -> Any:
    torch.manual_seed(0)
    return llama(WIDTH, LAYERS).eval()


def write_adapters(folder: Path) -> list[Path]:
    folders = []
    for number in range(EXPERTS):
        torch.manual_seed(number + 1)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
        model = get_peft_model(base(), config)
        folders.append(folder / f"expert{number}")
        model.save_pretrained(str(folders[-1]))
    return folders


def arm(name: str, folders: list[Path]) -> Any:
    if name == "base":
        return base()
    paths = [str(folder) for folder in folders]
    if name == "peft-arrow":
        from peft import ArrowConfig, create_arrow_model

        return create_arrow_model(base(), paths, ArrowConfig(top_k=3)).eval()
    if name == "x-lora":
        from peft import XLoraConfig

        model = base()
        model.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=WIDTH, adapters={str(i): p for i, p in enumerate(paths)}
        )
        return get_peft_model(model, config).eval()
    settings: dict[str, Any] = {}
    if name == "glider":
        settings = {"encoder": "hashing", "instructions": {f.name: f"task {f.name}" for f in folders}}
    return get_peft_model(base(), METHODS[name](adapters=paths, **settings)).eval()


def told(model: Any, rows: int) -> Any:
    """What GLIDER is told of a prompt, so that the tokens need no reading."""
    from moesaic.host import routing_scores

    return routing_scores(model, torch.rand(rows, EXPERTS))


def steps(models: dict[str, Any], kind: str) -> dict[str, Callable[[], Any]]:
    ids = torch.randint(3, VOCABULARY, (1, PREFILL if kind == "prefill" else PROMPT))

    def step(name: str, model: Any) -> Callable[[], Any]:
        cache = kind == "decode"

        def go() -> Any:
            with torch.no_grad():
                if kind == "prefill":
                    return model(input_ids=ids)
                asked = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": cache}
                return model.generate(input_ids=ids, pad_token_id=0, **asked)

        def run() -> Any:
            if name != "glider":
                return go()
            with told(model, 1):
                return go()

        return run

    chosen = {name: model for name, model in models.items() if not (kind == "decode" and name == "x-lora")}
    return {name: step(name, model) for name, model in chosen.items()}


def accuracy(model: Any, ours: Any, store: Store) -> dict[str, list[float]]:
    """|cos| of each module's prototypes to the true vectors: PEFT's, ours."""
    found: dict[str, list[float]] = {"peft": [], "moesaic": []}
    theirs = {n: m for n, m in model.named_modules() if hasattr(m, "lora_arrow") and len(m.lora_arrow)}
    layers = {n: m for n, m in ours.named_modules() if hasattr(m, "moe_lora_router")}
    for module in store.modules:
        truth = torch.stack([_first(*expert.read(module)) for expert in store.experts])
        arrow = next(m for n, m in theirs.items() if n.endswith(module)).lora_arrow["arrow_router"].prototypes
        own = next(m for n, m in layers.items() if n.endswith(module)).router("default").prototypes
        for key, prototypes in (("peft", arrow), ("moesaic", own)):
            found[key] += (prototypes.double() * truth).sum(-1).abs().tolist()
    return found


def _first(A: Tensor, B: Tensor) -> Tensor:
    return torch.linalg.svd(B.double() @ A.double()).Vh[0]


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "lowest": min(values), "n": len(values)}


def peak(name: str, folders: list[Path]) -> float:
    """MiB that a forward of 512 tokens adds to a fresh process."""
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import torch; from pathlib import Path\n"
        "import bench_adapters as b; from moesaic.bench import measure\n"
        f"models = {{{name!r}: b.arm({name!r}, [Path(p) for p in {[str(f) for f in folders]!r}])}}\n"
        f"step = b.steps(models, 'prefill')[{name!r}]; step(); print(measure.peak_of(step))"
    )
    return measure.in_fresh_process(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", type=Path, help="trained LoRA adapters of nano, of one rank")
    given = parser.parse_args()
    measure.keep_freed_memory()
    torch.set_num_threads(1)
    out: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "experts": EXPERTS, "rank": RANK, "width": WIDTH, "layers": LAYERS, "rounds": ROUNDS,
        "prefill_tokens": PREFILL, "prompt_tokens": PROMPT, "new_tokens": NEW,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(Path(scratch))
        models = {name: arm(name, folders) for name in ARMS}
        for kind in ("prefill", "decode", "decode-no-cache"):
            seconds = measure.interleave(steps(models, kind), ROUNDS, progress=lambda done, of: None)
            tokens = PREFILL if kind == "prefill" else NEW
            rows = {
                reference: measure.table(seconds, reference)
                for reference in ("peft-arrow", "x-lora")
                if reference in seconds
            }
            out[kind] = {
                name: {
                    "ms_per_token": 1e3 * statistics.median(values) / tokens,
                    **{
                        f"to_{reference}": {k: v for k, v in table[name].items() if k != "ms"}
                        for reference, table in rows.items()
                    },
                }
                for name, values in seconds.items()
            }
            print(kind, json.dumps(out[kind], indent=1), flush=True)
        out["prototypes"] = {
            "random": {
                k: spread(v)
                for k, v in accuracy(
                    models["peft-arrow"], models["arrow"], Store.read([str(f) for f in folders])
                ).items()
            }
        }
        if given.adapters:
            out["prototypes"]["trained"] = {k: spread(v) for k, v in trained(given.adapters).items()}
        print(json.dumps(out["prototypes"], indent=1), flush=True)
        del models
        if measure.can_measure_memory():
            out["peak_memory_mib"] = {name: peak(name, folders) for name in ARMS}
            print(json.dumps(out["peak_memory_mib"], indent=1))
    Path("results/bench-adapters.json").write_text(json.dumps(out, indent=1) + "\n")


def trained(adapters: list[Path]) -> dict[str, list[float]]:
    from peft import ArrowConfig, create_arrow_model

    from moesaic.models.embedded import load_model

    paths = [str(path) for path in adapters]
    theirs = create_arrow_model(load_model("nano").model, paths, ArrowConfig(top_k=3)).eval()
    with torch.no_grad():
        theirs(input_ids=torch.tensor([[5, 6, 7]]))
    named = {f"expert{i}": path for i, path in enumerate(paths)}
    ours = get_peft_model(load_model("nano").model, METHODS["arrow"](adapters=named, ignore_base=True)).eval()
    return accuracy(theirs, ours, Store.read(named))


if __name__ == "__main__":
    main()
