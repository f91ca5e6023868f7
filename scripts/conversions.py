"""Dense models made into experts, beside what costs as much: `python scripts/conversions.py nano|smollm2 [workers=N]`.

Held-out perplexity by domain of the model itself, of Read-ME (and of its experts with the domain told: the bound of its
router), of a split after CMoE, and of a dense model that is pruned to as many active neurons. All but the untrained
ones learn for the same steps, on batches drawn alike; Read-ME's router has read some before.
Each cell is a file in results/conversions/, and is not run again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cells
import torch

from moesaic import ffn
from moesaic.ffn.cmoe import CMoE
from moesaic.ffn.masks import Masks, masks, scores
from moesaic.ffn.pregate import PreGate
from moesaic.ffn.read_me import ReadMe
from moesaic.ffn.split import seats
from moesaic.ffn.tune import Rounds, masked, stage, tune
from moesaic.ffn.watching import batches_of
from moesaic.models.embedded import load_model
from moesaic.models.precision import numerics
from moesaic.runs.results import device_name, versions
from moesaic.training.domains import Domain, domains_of, figures, loss, mixed

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "conversions"
DATA = Path(os.environ.get("MOESAIC_DATA", ROOT.parent / "shared" / "data")) / "tasks"
SETTINGS: dict[str, dict[str, Any]] = {
    "nano": {
        "domains": {name: name for name in ("lists", "arithmetic", "table", "prose")},
        "router_dim": 64, "length": 128, "rows": 256, "held": 64, "batch": 16, "precision": "fp32",
        "rounds": Rounds(rounds=2, router_steps=100, expert_steps=200, router_lr=2e-3, expert_lr=5e-4),
    },
    "smollm2": {
        "domains": {"code": "stdlib", "docs": "pydoc", "math": str(DATA / "gsm8k"), "passages": str(DATA / "boolq")},
        "router_dim": 128, "length": 256, "rows": 128, "held": 16, "batch": 4, "precision": "auto",
        "rounds": Rounds(rounds=2, router_steps=60, expert_steps=120),
    },
}  # fmt: skip
SEEDS = (0, 1, 2)
ARMS = ("read-me", "read-me-released", "prune", "cmoe", "cmoe-tuned", "dense-tuned")


class Bench:
    """A setting's model and text, fresh for each cell."""

    def __init__(self, setting: str, seed: int) -> None:
        self.how, self.seed = SETTINGS[setting], seed
        self.plan = numerics(self.how["precision"])
        base = load_model(setting)
        self.model = base.model.to(self.plan.device)
        sizes = {"length": self.how["length"], "train": self.how["rows"], "held": self.how["held"]}
        self.domains = domains_of(self.how["domains"], base.tokenizer, **sizes, seed=seed)
        self.text = {name: domain.train for name, domain in self.domains.items()}
        self.width = min(seat.d_ff for seat in seats(self.model)) // 2

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in mixed(self.domains, self.how["batch"], self.seed):
            yield {name: values.to(self.plan.device) for name, values in batch.items()}

    def perplexities(self, model: Any) -> dict[str, float]:
        return {name: figure["perplexity"] for name, figure in figures(model, self.domains).items()}

    def told(self, found: Masks) -> dict[str, float]:
        """Perplexities with every token of a domain sent to the expert of its number."""
        made = {}
        for number, (name, domain) in enumerate(self.domains.items()):
            one = {layer: mask[number : number + 1] for layer, mask in found.items()}
            with _to_first(self.model, one):
                made[name] = float(torch.tensor(loss(self.model, domain.held)).exp())
        return made

    def pooled(self) -> Masks:
        found = scores(self.model, {name: batches_of(rows, 8) for name, rows in self.text.items()})
        mean = {name: score.mean(dim=0, keepdim=True) for name, score in found.items()}
        return masks(mean, self.width)

    def tuned(self, found: Masks) -> None:
        """All parameters, through masks of one expert, for as many steps as Read-ME's experts."""
        rounds = self.how["rounds"]
        router = PreGate(self.model.get_input_embeddings().num_embeddings, 1, dim=8, heads=1).to(self.plan.device)
        plain = Rounds(**{**vars(rounds), "router_steps": 0})
        for _ in tune(self.model, router, found, self.batches(), plain, around=self.plan.context):
            pass


@contextmanager
def _to_first(model: Any, found: Masks) -> Iterator[None]:
    """Every token through the first mask."""
    running: dict[str, torch.Tensor] = {}

    def remember(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        running["chosen"] = torch.zeros_like(kwargs["input_ids"])

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with masked(model, found, lambda: running["chosen"]):
            yield
    finally:
        handle.remove()


def routed_right(router: PreGate, domains: dict[str, Domain]) -> dict[str, float]:
    """The share of held-out tokens that go to the expert of their domain."""
    device = router.embedding.weight.device
    with torch.no_grad():
        return {
            name: float((router(domain.held.to(device))[0].argmax(-1) == number).float().mean())
            for number, (name, domain) in enumerate(domains.items())
        }


def cell(setting: str, arm: str, seed: int) -> dict[str, Any]:
    bench = Bench(setting, seed)
    how, model = bench.how, bench.model
    made: dict[str, Any] = {"arm": arm, "seed": seed}
    if arm.startswith("read-me"):
        method = ReadMe(list(bench.domains), router_dim=how["router_dim"])
        parts = method.parts(model, bench.text, seed=seed)
        found, router = parts["masks"], parts["pre_gate"]
        if arm == "read-me":
            made |= {"dense": bench.perplexities(model), "told-untuned": bench.told(found)}
        rounds = Rounds(**{**vars(how["rounds"]), "loss": "released" if arm.endswith("released") else "paper"})
        for _ in tune(model, router, found, bench.batches(), rounds, around=bench.plan.context):
            pass
        made |= {"told": bench.told(found), "routed_right": routed_right(router, bench.domains)}
        made["perplexity"] = bench.perplexities(ffn.convert(model, method, **parts))
    elif arm == "prune":
        found = bench.pooled()
        with _to_first(model, found):
            made["untuned"] = bench.perplexities(model)
        bench.tuned(found)
        with _to_first(model, found):
            made["perplexity"] = bench.perplexities(model)
    elif arm == "dense-tuned":
        bench.tuned({seat.name: torch.ones(1, seat.d_ff, dtype=torch.bool) for seat in seats(model)})
        made["perplexity"] = bench.perplexities(model)
    else:
        method = CMoE(8, 2, 2)
        routed = ffn.convert(model, method, **method.parts(model, bench.text))
        rounds, batches, learn = how["rounds"], bench.batches(), partial(_lm, routed)
        for number in range(rounds.rounds if arm == "cmoe-tuned" else 0):
            rate = rounds.decay**number * rounds.expert_lr
            stage(routed, [], rounds.expert_steps, rate, rounds.weight_decay, batches, learn, None, bench.plan.context)
        made["perplexity"] = bench.perplexities(routed)
    return made | {"device": device_name(bench.plan.device), "versions": versions()}


def _lm(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    return found


def main() -> None:
    setting, workers = cells.asked(SETTINGS, __doc__)
    cells.make(cell, setting, ARMS, SEEDS, OUT / setting, workers)


if __name__ == "__main__":
    main()
