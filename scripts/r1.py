"""Router-R1 on the world of lists: results/r1.jsonl, a line a cell: `python scripts/r1.py FOLDER [seeds=0,1,2]`.

`steps=15 threads=2` instead times so many steps of GRPO, from seed 0's warm start, into results/r1-steps.jsonl.

FOLDER is of a seed from scripts/llm_pool.py: its four nano members are served over HTTP, and asked for real. For each
seed one warm start imitates a script that asks one who knows, at any price; GRPO goes on with each weight of cost.
Beside the policies, scripts that ask one model for all, at random, by the nearest training question (once, with the
whole question), or as the prompt says (what can be had at most). Test questions: one and two hops, a specialist by a
name that was never learned, a specialist whose tasks nobody had together, and prices that have changed places. What a
cell left in FOLDER/r1 it goes on from.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.llms.catalog import Model
from moesaic.llms.pool import MEMBERS, serving
from moesaic.llms.router_r1 import scores, scripts, warm, world
from moesaic.llms.router_r1.asking import HttpPool
from moesaic.llms.router_r1.engine import Limits, Policy, Question, plainly, roll
from moesaic.llms.router_r1.for_trl import Rollouts
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.rewards import Rewards, exact_match
from moesaic.models.embedded import load_model
from moesaic.runs.results import versions

ROOT = Path(__file__).parents[1]
FILE = ROOT / "results" / "r1.jsonl"
ALPHAS = (0.0, 0.6, 0.9)
WARM, STEPS, GROUP, QUESTIONS = 700, 150, 8, 8
LIMITS = Limits(turns=4, reply_tokens=16)
TESTED = 200
"""Questions of each test."""
UNTRAINED = 50
"""Of those that an untrained policy is asked, whose prompt is longer by what a transcript is."""
UNSEEN, TOGETHER = world.HELD[0], ("asc", "reverse")


@dataclass
class World:
    models: Mapping[str, Model]
    pool: HttpPool

    def questions(self, n: int, hops: int, seed: str, **how: Any) -> list[Question]:
        return world.questions(self.models, n, hops, seed, **how)

    def tests(self, n: int = TESTED) -> dict[str, list[Question]]:
        swapped = {"order": 8.0, "move": 8.0, "pick": 8.0, "lists": 1.0}
        return {
            "two hops": self.questions(n, 2, "test"),
            "one hop": self.questions(n, 1, "test"),
            "unseen name": self.questions(n, 2, "unseen", renamed={"order": UNSEEN}),
            "newcomer": self.questions(n, 2, "newcomer", newcomer=TOGETHER),
            "changed prices": self.questions(n, 2, "prices", fewest=4, prices=swapped),
        }


def measured(
    policy: Policy, pool: HttpPool, asked: Sequence[Question], say: Callable[[Question], str] = world.told
) -> dict[str, Any]:
    """Exact match, cost, calls, faults, and whom a policy asks."""
    found = roll(policy, pool, asked, LIMITS, say=say)
    theirs = {*world.KNOWS["order"]}
    unseen = [r for r in found if UNSEEN in r.question.catalog and theirs & {*r.question.about["tasks"]}]
    asks = [any(call.model == UNSEEN for call in r.calls) for r in unseen]
    named = Counter(_real(r.question, call.model) for r in found for call in r.calls if call.asked)
    hops = [
        (r.question, call.model) for r in found for task, call in zip(r.question.about["tasks"], r.calls, strict=False)
        if task in TOGETHER and world.called(r.question, world.NEWCOMER)
    ]  # fmt: skip
    new = [name == world.called(question, world.NEWCOMER) for question, name in hops]
    return {
        **scores.measured(found), "asks the unseen": statistics.fmean(asks) if asks else None,
        "asks the newcomer": statistics.fmean(new) if new else None,
        "by chance": statistics.fmean(1 / len(question.catalog) for question, _ in hops) if hops else None,
        **scores.who(named),
    }  # fmt: skip


def _real(question: Question, word: str) -> str:
    return next(name for name, other in question.about["named"].items() if other == word)


def fresh(seed: int) -> LocalPolicy:
    loaded = load_model("nano")
    warm.with_tags(loaded.model, loaded.tokenizer, seed)
    return LocalPolicy(loaded.model.eval(), loaded.tokenizer, max_new_tokens=32)


def greedy(policy: LocalPolicy, here: World, *, said: bool = False) -> dict[str, Any]:
    """Figures of every test. said: the prompt says what a transcript is, for a policy that has not learned it."""
    policy.temperature = 0.0
    say = plainly if said else world.told
    tests = here.tests(UNTRAINED if said else TESTED)
    found = {name: measured(policy, here.pool, asked, say) for name, asked in tests.items()}
    policy.temperature = 1.0
    return found


def warmed(place: Path, here: World, seed: int) -> tuple[LocalPolicy, dict[str, Any]]:
    """A policy that has learned to write transcripts, and what that took."""
    policy, out, begun = fresh(seed), place / f"warm-s{seed}", time.process_time()
    asked = [*here.questions(1800, 1, f"warm {seed}"), *here.questions(4200, 2, f"warm {seed}")]
    script = scripts.Script(asked, scripts.able_at_random(seed))
    shown = roll(script, here.pool, asked, LIMITS, say=world.told)
    rows = warm.rows(policy, shown, [world.told(question) for question in asked])
    loss = warm.imitate(policy, rows, out, steps=WARM, lr=2e-3, seed=seed)
    return policy, {"loss": loss, "cpu_seconds": time.process_time() - begun}


def trained(
    place: Path, here: World, seed: int, alpha: float, policy: LocalPolicy, *, steps: int = STEPS
) -> dict[str, Any]:
    """GRPO from a warm start; figures of every step, and what it took."""
    from transformers.trainer_utils import get_last_checkpoint
    from trl import GRPOConfig, GRPOTrainer

    held = frozenset(world.written(q.about["digits"]) for asked in here.tests().values() for q in asked)
    asked = here.questions(steps * QUESTIONS, 2, f"train {seed}", exclude=held)
    rollouts = Rollouts(policy, here.pool, asked, Rewards(alpha), LIMITS, say=world.told)
    out = place / f"grpo-s{seed}-a{alpha:g}"
    arguments = GRPOConfig(
        str(out), max_steps=steps, per_device_train_batch_size=GROUP * QUESTIONS, num_generations=GROUP,
        learning_rate=3e-4, warmup_steps=5, lr_scheduler_type="constant_with_warmup", beta=0.0, loss_type="grpo",
        adam_beta2=0.99, report_to=[], use_cpu=True, bf16=False, logging_steps=10, save_steps=25, save_total_limit=1,
        seed=seed, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        policy.model, rollouts.reward, arguments, rollouts.data(), processing_class=policy.tokenizer,
        rollout_func=rollouts.rollout, callbacks=[rollouts.callback()],
    )  # fmt: skip
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    if last:
        rollouts.take_back(last)
    begun, clock = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=last)
    policy.model.eval()
    return {
        "figures": rollouts.figures, "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - clock,
        "resumed": bool(last), "asked": here.pool.asked, "hits": here.pool.hits,
    }  # fmt: skip


def baselines(here: World) -> dict[str, Any]:
    """Scripts by name, on every test."""
    from sklearn.neighbors import KNeighborsClassifier

    asked = here.questions(800, 2, "knn") + here.questions(400, 1, "knn")
    cues = [" ".join(word for word in q.text.split() if not word.isdecimal()) for q in asked]
    kinds = {cue: [float(cue == other) for other in dict.fromkeys(cues)] for cue in dict.fromkeys(cues)}
    rows = {name: scripts.Script(asked, scripts.always(name), whole=True) for name in world.KNOWS}
    right = {
        name: [exact_match(r.answer, r.question.truths) for r in roll(s, here.pool, asked, LIMITS, say=world.told)]
        for name, s in rows.items()
    }
    best = [max(right, key=lambda name: right[name][i]) for i in range(len(asked))]
    near = KNeighborsClassifier(20).fit([kinds[cue] for cue in cues], best)

    def nearest(question: Question, hop: int) -> str:
        cue = " ".join(word for word in question.text.split() if not word.isdecimal())
        name = str(near.predict([kinds.get(cue, [0.0] * len(kinds))])[0])
        return world.called(question, name) or next(iter(question.catalog))

    rules: dict[str, tuple[scripts.Choose, bool]] = {
        "best single model, once": (scripts.always("lists"), True), "k-NN, once": (nearest, True),
        "at random, once": (scripts.at_random(0), True), "at random, each hop": (scripts.at_random(1), False),
        "generalist, each hop": (scripts.always("lists"), False),
        "as the prompt says, each hop": (scripts.cheapest, False),
    }  # fmt: skip
    return {
        rule: {name: measured(scripts.Script(q, choose, whole), here.pool, q) for name, q in here.tests().items()}
        for rule, (choose, whole) in rules.items()
    }


def cells(place: Path, here: World, seeds: Sequence[int]) -> None:
    done = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []
    there = {(cell["arm"], cell["seed"]) for cell in done}

    def keep(arm: str, seed: int, found: dict[str, Any]) -> None:
        with FILE.open("a") as out:
            out.write(json.dumps({"arm": arm, "seed": seed, **found}) + "\n")
        print(arm, seed, {k: round(v["em"], 3) for k, v in found.get("tests", {}).items()}, flush=True)

    if ("scripts", 0) not in there:
        for rule, tests in baselines(here).items():
            keep(rule, 0, {"tests": tests})
        keep("scripts", 0, {})
    if ("untrained", 0) not in there:
        loaded = load_model("nano")
        policy = LocalPolicy(loaded.model.eval(), loaded.tokenizer, max_new_tokens=32)
        keep("untrained", 0, {"tests": greedy(policy, here, said=True)})
    for alpha in ALPHAS:
        for seed in seeds:
            if (f"alpha {alpha:g}", seed) in there:
                continue
            policy, took = warmed(place, here, seed)
            if ("warm start", seed) not in there:
                keep("warm start", seed, {"tests": greedy(policy, here), **took})
                there.add(("warm start", seed))
            made = trained(place, here, seed, alpha, policy)
            keep(f"alpha {alpha:g}", seed, {"tests": greedy(policy, here), **made})


def timed(place: Path, here: World, steps: int, threads: int) -> None:
    """A line of seconds and CPU seconds a step of training that is begun anew."""
    policy, _ = warmed(place, here, 0)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as anew:
        made = trained(Path(anew), here, 0, 0.0, policy, steps=steps)
    found = {"steps": steps, "threads": threads, **{key: made[key] / steps for key in ("seconds", "cpu_seconds")}}
    with FILE.with_name("r1-steps.jsonl").open("a") as out:
        out.write(json.dumps({**found, "versions": versions(("torch", "transformers", "trl"))}) + "\n")
    print(found)


def main(folder: str, *rest: str) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    given = dict(text.split("=", 1) for text in rest)
    place = Path(folder)
    runs = {member.name: place / member.name for member in MEMBERS}
    with serving(MEMBERS, runs, place) as catalog:
        models = {name.removeprefix("nano-"): model for name, model in catalog.items()}
        here = World(models, HttpPool(bare=True, max_tokens=16))
        if "steps" in given:
            timed(place / "r1", here, int(given["steps"]), int(given.get("threads", 1)))
        else:
            cells(place / "r1", here, [int(seed) for seed in given.get("seeds", "0,1,2").split(",")])


if __name__ == "__main__":
    main(*sys.argv[1:])
