"""Small language models trained from nothing, in two tables: `python scripts/pretraining.py slim|depth [workers=N]`.

`slim`: held-out loss of one trained model at every k, of SMoE-Dropout, a learned router trained at k=2, elastic
training and dense twins. `depth`: RMoE beside linear routers: loss, what a token's choice in one layer says of the
next, balance, gradients of the routers. Each cell (an arm and a seed) is a file in results/pretraining/, and is not
run again.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import cells

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "pretraining"
SEEDS = (0, 1, 2)
KS = (1, 2, 4, 8, 16)
SLIM = {
    "dense": ("dense", []),
    "dense-eighth": ("dense", ["config.intermediate_size=64"]),
    "learned-2": ("learned", []),
    "smoe-dropout": ("smoe-dropout", []),
    "smoe-dropout-from-1": ("smoe-dropout", ["k_min=1"]),
    "elastic": ("elastic", []),
    "fixed-2": ("smoe-dropout", ["k_schedule=constant", "k_min=2", "k_max=2"]),
}
DEPTH = {
    "linear": ("mixtral", []),
    "rmoe": ("rmoe", []),
    "rmoe-np": ("rmoe", ["experts.recurrence=none"]),
    "rmoe-detach": ("rmoe", ["experts.recurrence=detach"]),
    "stateless-shared": (
        "rmoe", ["experts.recurrence=none", "experts.shared_projector=true", "experts.shared_head=true"]
    ),
}  # fmt: skip
SUITES = {"slim": SLIM, "depth": DEPTH}


def cell(suite: str, arm: str, seed: int) -> dict[str, Any]:
    """Train one model and measure it."""
    import torch

    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    from moesaic import ffn
    from moesaic.runs.pretraining import load_pretraining
    from moesaic.training.domains import domains_of, figures, named
    from moesaic.training.pretrain import built, pretrain

    recipe, settings = SUITES[suite][arm]
    folder = ROOT / "runs" / "pretraining" / f"{suite}-{arm}-s{seed}"
    settings = [*settings, f"seed={seed}"]
    wanted = load_pretraining(f"pretrain/{recipe}", [*settings, f"out={folder}"])
    if (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text())
    else:
        results = pretrain(wanted, command=" ".join(["moesaic train", f"pretrain/{recipe}", *settings]), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if ffn.is_converted(folder / "model"):
        ffn.class_of(folder / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    held = domains_of(
        named([*results["held_out"]]), tokenizer, length=wanted.length, train=8, held=wanted.held_out, seed=seed
    )
    kept = ("steps", "held_out", "mean_loss", "total_parameters", "command", "versions", "device")
    made = {"arm": arm, "seed": seed} | {key: results[key] for key in kept}

    def mean_loss(model: Any) -> float:
        return statistics.mean(figure["loss"] for figure in figures(model, held).values())

    if suite == "slim":
        from moesaic.ffn.slimming import top_k

        if wanted.method:
            made["by_k"] = {}
            for k in KS:
                with top_k(model, k):
                    made["by_k"][k] = mean_loss(model)
        return made
    rows = torch.cat([domain.held[:8] for domain in held.values()])
    return made | {"routing": routing(model, rows), "gradients": {
        "trained": gradients(model, rows), "untrained": gradients(built(wanted, tokenizer), rows)
    }}  # fmt: skip


def routing(model: Any, rows: Any) -> dict[str, float]:
    """Figures of a RoutingTrace, of the logits that the model itself gives out."""
    import torch

    from moesaic.routing import Record, Routing, RoutingTrace, Site

    trace = RoutingTrace()
    model.eval()
    for batch in rows.split(8):
        with torch.no_grad():
            every = model(input_ids=batch, output_router_logits=True, use_cache=False).router_logits
        records = []
        for layer, logits in enumerate(every):
            probs = logits.float().softmax(-1)
            weights, index = probs.topk(model.config.num_experts_per_tok, dim=-1)
            routed = Routing(torch.zeros_like(probs).scatter(-1, index, weights), probs, logits.float())
            site = Site(
                f"layers.{layer}.gate", model.config.hidden_size, probs.shape[-1], layer=layer, num_layers=len(every)
            )
            records.append(Record(site, routed))
        trace.update(records)
    return {
        "layer_information": trace.layer_information(),
        "inner_balance": trace.inner_balance(),
        "outer_balance": trace.outer_balance(),
        "entropy": trace.entropy(),
    }


def gradients(model: Any, rows: Any) -> list[float]:
    """Norm of the loss's gradient to each layer's own map of its input, P of a recurrent router or W of a linear one.

    Over the norm of that map. A map that layers share is counted in the first.
    """
    from moesaic.ffn.recurrent import gates

    model.train()
    model.zero_grad()
    model(input_ids=rows, labels=rows, output_router_logits=False, use_cache=False).loss.backward()
    found, seen = [], set()
    for _, gate in gates(model):
        weight = gate.recurrent.projector.weight if hasattr(gate, "recurrent") else gate.weight
        if id(weight) not in seen:
            found.append(float(weight.grad.norm() / weight.detach().norm()))
        seen.add(id(weight))
    return found


def main() -> None:
    suite, workers = cells.asked(SUITES, __doc__)
    cells.make(cell, suite, SUITES[suite], SEEDS, OUT / suite, workers)


if __name__ == "__main__":
    main()
