"""Compositions of experts on recorded outcomes, all replayed: results/coe.json.

    python scripts/coe.py [data=../shared/data/llm_routing] [encoders=tfidf,minilm,tfidf+minilm] [only=speed]

LLMRouter's table as it is shipped: fitted to train, scored on test, by the prompts' texts alone; the 119 test prompts
that are in train too are counted apart. RouteLLM's MMLU and GSM8K: half to fit, half to score. RouterArena's prompts
are only looked at. Every setting is chosen on training rows. Takes ten minutes; only=speed times decisions again, and
wants an idle machine.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MoesaicError
from moesaic.llms.catalog import Catalog
from moesaic.llms.coe.bank import nearest, weights
from moesaic.llms.coe.calibration import calibration_error, entropy, log_loss, risk_coverage
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.composition import MAPS, Composition
from moesaic.llms.coe.encoders import Sentences
from moesaic.llms.coe.estimates import Estimates
from moesaic.llms.coe.fit import Fitting, fit
from moesaic.llms.coe.folds import FOLDS, folds_of
from moesaic.llms.coe.mapping import solve
from moesaic.llms.coe.problem import Budget, Problem
from moesaic.llms.coe.uncertainty import KINDS
from moesaic.llms.tables import Floats, Table, llmrouter_catalog, read_table
from moesaic.runs.folder import write_json
from moesaic.runs.results import versions

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "coe.json"
BUDGETS = (24, 60, 110)
"""Billions of resident parameters."""
DRAWS = 10_000
NEIGHBOURS = 80
SHARES = np.linspace(0, 1, 21)
"""Of prompts that the strong model answers."""

said = logging.getLogger("coe").info


def numbers(names: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    return np.array([list(known).index(name) for name in names])


def interval(values: Floats, seed: int = 0) -> dict[str, Any]:
    """Mean, and its 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return {"mean": round(float(values.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


# -- LLMRouter -----------------------------------------------------------------------------------------------------


def scored(table: Table, experts: Sequence[str], catalog: Catalog, new: NDArray[np.bool_]) -> dict[str, Any]:
    """Of the experts that answer a table's prompts."""
    scores = table.scores[np.arange(len(table)), numbers(experts, table.models)]
    return {
        **interval(scores), "standard_error": round(float(scores.std() / np.sqrt(len(scores))), 4),
        "new": round(float(scores[new].mean()), 4), "repeated": round(float(scores[~new].mean()), 4),
        "average_active": round(float(np.mean([catalog[name].active_size for name in experts])), 2),
        "used": dict(Counter(experts).most_common()),
    }  # fmt: skip


def replayed(table: Table, experts: Sequence[str]) -> Floats:
    return table.scores[np.arange(len(table)), numbers(experts, table.models)]


def baselines(train: Table, test: Table, catalog: Catalog, router: CategoryRouter) -> dict[str, list[str]]:
    """Experts of each test prompt, by routers that know no budget."""
    from sklearn.linear_model import LogisticRegression

    models, sizes = list(train.models), np.array([catalog[name].size for name in train.models])
    small = np.argsort(sizes, kind="stable")
    best = small[train.scores[:, small].argmax(axis=1)]
    rows, keys = router.embed(test.prompts), router.bank.of(router.embed(test.prompts))
    at, cosines = nearest(router.bank.keys, keys, NEIGHBOURS)
    near = (weights(cosines, 6.0)[:, :, None] * train.scores[router.bank.drawn][at]).sum(axis=1)
    chosen = LogisticRegression(C=10, max_iter=1000, tol=1e-3).fit(router.rows, best).predict(rows)
    single = int(train.scores.mean(axis=0).argmax())
    return {
        "best single": [models[single]] * len(test), "largest": [models[int(sizes.argmax())]] * len(test),
        "k-NN per prompt": [models[i] for i in near.argmax(axis=1)],
        "logistic per prompt": [models[i] for i in chosen],
        "random": [models[i] for i in np.random.default_rng(0).integers(0, len(models), len(test))],
        "oracle": [models[small[i]] for i in test.scores[:, small].argmax(axis=1)],
    }  # fmt: skip


def compositions(train: Table, test: Table, catalog: Catalog, encoder: str, new: Any) -> tuple[dict[str, Any], Any]:
    """Every map at every budget, and the router they share."""
    before = time.process_time()
    router = CategoryRouter.fit(train.prompts, train.categories, encoder=encoder)
    spent = time.process_time() - before
    y, z = numbers(train.categories, router.categories), numbers(test.categories, router.categories)
    p = router.probabilities(test.prompts)
    right = p.argmax(axis=1) == z
    tau, kept, risk = risk_coverage(entropy(p), right)
    thin = np.unique(np.linspace(0, len(tau) - 1, 60).astype(int))
    found: dict[str, Any] = {
        "router": {
            "cpu_seconds": round(spent, 1), "held_out_accuracy": float((router.held_out.argmax(axis=1) == y).mean()),
            "test_accuracy": float(right.mean()), "test_accuracy_new": float(right[new].mean()),
            "held_out_calibration_error": calibration_error(router.held_out, y),
            "test_calibration_error": calibration_error(p, z), "test_log_loss": log_loss(p, z),
            "accuracy_of_most_certain": {f"{s:.0%}": accuracy_at(kept, risk, s) for s in (0.9, 0.8, 0.5)},
            "risk_coverage": [[round(float(v[i]), 4) for v in (tau, kept, risk)] for i in thin],
        }
    }  # fmt: skip
    by_truth = Problem.of_table(train, catalog)
    made: dict[str, Composition] = {}
    for budget in BUDGETS:
        truth = solve(by_truth, Budget(resident=budget))
        experts = {"true categories": [truth.expert[category] for category in test.categories]}
        row: dict[str, Any] = {}
        for map in MAPS:
            settings = Fitting(map=map, encoder=encoder, uncertainty="none")
            made[f"{map} {budget}"] = one = fit(train, catalog, Budget(resident=budget), settings, router=router)
            experts[map] = [decision.expert for decision in one.decide_many(test.prompts)]
            row[map] = {"resident": one.experts, "held_out": one.about["held_out"]}
        for name, chosen in experts.items():
            row[name] = {**scored(test, chosen, catalog, new), **row.get(name, {})}
        pairs = [
            ("posterior", "hard"),
            ("blend", "hard"),
            ("blend", "posterior"),
            *((m, "true categories") for m in MAPS),
        ]
        row["paired"] = {
            f"{a} less {b}": interval(replayed(test, experts[a]) - replayed(test, experts[b])) for a, b in pairs
        }
        found[f"resident {budget}"] = row
        said("%s %s: %s", encoder, budget, {name: row[name]["mean"] for name in experts})
    return found, (router, made)


def accuracy_at(kept: Floats, risk: Floats, share: float) -> float:
    """Of the share that is most certain."""
    return round(1 - float(risk[np.searchsorted(kept, share)]), 4)


def cross_validated(train: Table, catalog: Catalog, encoder: str) -> dict[str, Any]:
    """Every map on training rows that neither its router nor its mapping has seen, and paired differences."""
    folds = folds_of(np.unique(train.categories, return_inverse=True)[1], seed=1)
    scores = {f"{map} {budget}": np.empty(len(train)) for map in MAPS for budget in BUDGETS}
    for fold in range(FOLDS):
        seen, here = train.rows(folds != fold), train.rows(folds == fold)
        router = CategoryRouter.fit(seen.prompts, seen.categories, encoder=encoder)
        for budget in BUDGETS:
            for map in MAPS:
                settings = Fitting(map=map, encoder=encoder, uncertainty="none")
                one = fit(seen, catalog, Budget(resident=budget), settings, router=router)
                chosen = [decision.expert for decision in one.decide_many(here.prompts)]
                scores[f"{map} {budget}"][folds == fold] = replayed(here, chosen)
        said("fold %d of %d", fold + 1, FOLDS)
    return {
        str(budget): {
            **{map: interval(scores[f"{map} {budget}"]) for map in MAPS},
            **{f"{map} less hard": interval(scores[f"{map} {budget}"] - scores[f"hard {budget}"]) for map in MAPS[1:]},
        }
        for budget in BUDGETS
    } | {"mean": {map: round(float(np.mean([scores[f"{map} {b}"].mean() for b in BUDGETS])), 4) for map in MAPS}}


def rules(train: Table, test: Table, catalog: Catalog, router: CategoryRouter, new: Any) -> dict[str, Any]:
    """What sending the uncertain to general does, at the largest budget."""
    found = {}
    for kind in KINDS:
        settings = Fitting(map="posterior", uncertainty=kind, accuracy=0.95)
        one = fit(train, catalog, Budget(resident=BUDGETS[-1]), settings, router=router)
        decisions = one.decide_many(test.prompts)
        sure = np.array([not d.uncertain for d in decisions])
        right = np.array([d.category == c for d, c in zip(decisions, test.categories, strict=True)])
        found[kind] = {
            **scored(test, [d.expert for d in decisions], catalog, new), "kept": float(sure.mean()),
            "accuracy_of_kept": float(right[sure].mean()), "tau": one.rule.tau, "level": one.rule.level,
        }  # fmt: skip
    return found


def edits(seed: int = 0) -> dict[str, Callable[[str], str]]:
    draw = random.Random(seed)

    def typos(text: str) -> str:
        """Two neighbouring letters change places in one word of ten, and in one word at least."""
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) > 3]
        for i in draw.sample(long, min(len(long), max(1, len(words) // 10))):
            at = draw.randrange(1, len(words[i]) - 2)
            words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
        return " ".join(words)

    return {
        "typos": typos, "upper case": str.upper, "polite prefix": lambda text: "Hello, can you please help me? " + text,
        "blank lines": lambda text: "\n\n" + text.replace("\n", "\n\n") + "\n\n\n",
    }  # fmt: skip


def survival(made: dict[str, Composition], prompts: Sequence[str]) -> dict[str, Any]:
    """Share of prompts that go to the same expert after an edit."""
    found: dict[str, Any] = {}
    for name, one in made.items():
        before = [d.expert for d in one.decide_many(prompts)]
        for edit, change in edits().items():
            after = [d.expert for d in one.decide_many([change(prompt) for prompt in prompts])]
            found.setdefault(name, {})[edit] = float(np.mean([a == b for a, b in zip(before, after, strict=True)]))
    return found


# -- the others ----------------------------------------------------------------------------------------------------


def routellm(file: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Quality by the share of prompts that the strong model answers, and the mean share of the gap that is recovered.

    PGR = (quality - weak) / (strong - weak); APGR is its mean over shares from 0 to 1 (RouteLLM, Ong et al. 2024).
    """
    table = read_table(file)
    strong = int(table.scores.mean(axis=0).argmax())
    curves: dict[str, list[Floats]] = {}
    for seed in seeds:
        labels = np.unique(table.categories, return_inverse=True)[1]
        half = folds_of(labels, seed) % 2 == 0  # three folds of five
        train, test = table.rows(half), table.rows(~half)
        kinds = [category or "all" for category in train.categories]
        router = CategoryRouter.fit(train.prompts, kinds, encoder="tfidf")
        y = numbers(kinds, router.categories)
        rows = router.embed(test.prompts)
        at, cosines = nearest(router.bank.keys, router.bank.of(rows), NEIGHBOURS)
        near = weights(cosines, 6.0)
        near = ((near / near.sum(axis=1, keepdims=True))[:, :, None] * train.scores[router.bank.drawn][at]).sum(axis=1)
        found = {"k-NN": near}
        for name, blend in (("posterior", False), ("blend", True)):
            estimates, _ = Estimates.fit(router, train.prompts, y, train.scores, blend=blend)
            found[name] = estimates(router.bank, test.prompts, rows, router.of_rows(rows))
        gains = {name: held[:, strong] - held[:, 1 - strong] for name, held in found.items()}
        gains["oracle"] = test.scores[:, strong] - test.scores[:, 1 - strong]
        gains["random"] = np.random.default_rng(seed).random(len(test))
        for name, gain in gains.items():
            curves.setdefault(name, []).append(quality(test.scores, gain, strong))
    made = {}
    for name, drawn in curves.items():
        recovered = [(c - c[0]) / (c[-1] - c[0]) for c in drawn]
        each = [float(np.trapezoid(r, SHARES)) for r in recovered]
        made[name] = {
            "apgr": round(statistics.mean(each), 4), "apgr_by_seed": [round(a, 4) for a in each],
            "area": round(float(np.mean([np.trapezoid(c, SHARES) for c in drawn])), 4),
            "quality": [round(float(q), 4) for q in np.mean(drawn, axis=0)],
        }  # fmt: skip
    return {"prompts": len(table), "strong": table.models[strong], "weak": table.models[1 - strong], "seeds": [*seeds],
            "shares": [round(float(s), 2) for s in SHARES], "routers": made}  # fmt: skip


def quality(scores: Floats, gain: Floats, strong: int) -> Floats:
    """Mean score where the strong model answers the prompts of the largest gain, by their share."""
    order = np.argsort(-gain, kind="stable")
    rising = np.concatenate([[0.0], np.cumsum((scores[:, strong] - scores[:, 1 - strong])[order])])
    return scores[:, 1 - strong].mean() + rising[(SHARES * len(scores)).round().astype(int)] / len(scores)


def arena(table: Table, test: Table, router: CategoryRouter, catalog: Catalog) -> dict[str, Any]:
    """Prompts of other kinds: what the router makes of them. Nothing is fitted to them."""
    from sklearn.metrics import roc_auc_score

    try:
        fit(table, catalog)
        refused = ""
    except MoesaicError as error:
        refused = str(error).replace(str(ROOT.parent), "..")
    ours, theirs = router.embed(test.prompts), router.embed(table.prompts)
    u = {
        "novelty": (router.bank.novelty(ours), router.bank.novelty(theirs)),
        "entropy": (entropy(router.of_rows(ours)), entropy(router.of_rows(theirs))),
    }
    assigned = Counter(router.categories[i] for i in router.of_rows(theirs).argmax(axis=1))
    return {
        "refused": refused, "prompts": len(table), "assigned": dict(assigned.most_common()),
        "told_apart": {
            name: {
                "auroc": round(float(roc_auc_score([0] * len(a) + [1] * len(b), np.concatenate([a, b]))), 4),
                "beyond_the_95th_percentile_of_ours": round(float((b > np.quantile(a, 0.95)).mean()), 4),
            }
            for name, (a, b) in u.items()
        },
    }  # fmt: skip


def speed(made: dict[str, Composition], prompts: Sequence[str], rounds: int = 3) -> dict[str, Any]:
    """Milliseconds of a decision, of one prompt after another; arms take turns."""
    wall: dict[str, list[float]] = {name: [] for name in made}
    spent: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, one in made.items():
            for prompt in prompts[::5]:
                began, cpu = time.perf_counter(), time.process_time()
                one.decide(prompt)
                wall[name].append(1e3 * (time.perf_counter() - began))
                spent[name].append(1e3 * (time.process_time() - cpu))
    return {
        name: {
            "wall_p50": round(statistics.median(wall[name]), 3), "cpu_p50": round(statistics.median(spent[name]), 3),
            "wall_p10": round(float(np.quantile(wall[name], 0.1)), 3),
        }
        for name in made
    } | {"load_average": round(os.getloadavg()[0], 1)}  # fmt: skip


@contextmanager
def remembering() -> Iterator[None]:
    """Sentence encoders read each prompt once."""
    read, known = Sentences.__call__, dict[tuple[str, str], Any]()

    def rows(self: Sentences, prompts: Sequence[str]) -> Any:
        if lacking := [prompt for prompt in dict.fromkeys(prompts) if (self.name, prompt) not in known]:
            known.update(zip([(self.name, prompt) for prompt in lacking], read(self, lacking), strict=True))
        return np.stack([known[self.name, prompt] for prompt in prompts])

    Sentences.__call__ = rows  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sentences.__call__ = read  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    data = Path(given.get("data", ROOT.parent / "shared" / "data" / "llm_routing"))
    wanted = given.get("encoders", "tfidf,minilm,tfidf+minilm").split(",")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("moesaic").setLevel(logging.WARNING)
    train, test = (read_table(data / "llmrouter" / f"{part}.json") for part in ("train", "test"))
    catalog = llmrouter_catalog(data / "llmrouter")
    new = ~np.isin(test.prompts, train.prompts)
    found: dict[str, Any] = {
        "what": "all replayed: outcomes were recorded by others, nothing was asked", "command": "python scripts/coe.py",
        "versions": versions(("numpy", "scipy", "scikit-learn")),
        "llmrouter": {"train": len(train), "test": len(test), "test_prompts_in_train": int((~new).sum())},
    }  # fmt: skip
    timed: dict[str, Composition] = {}
    if given.get("only") == "speed":
        for encoder in wanted:
            router = CategoryRouter.fit(train.prompts, train.categories, encoder=encoder)
            for map in MAPS:
                settings = Fitting(map=map, encoder=encoder, uncertainty="none")
                timed[f"{encoder} {map}"] = fit(train, catalog, Budget(resident=110), settings, router=router)
        found = json.loads(OUT.read_text()) | {"milliseconds_a_decision": speed(timed, test.prompts)}
        write_json(OUT, found)
        return
    with remembering():
        for encoder in wanted:
            found["llmrouter"][encoder], (router, made) = compositions(train, test, catalog, encoder, new)
            if encoder == wanted[0]:
                chosen = baselines(train, test, catalog, router)
                found["llmrouter"]["baselines"] = {
                    name: scored(test, who, catalog, new) for name, who in chosen.items()
                }
                best = replayed(test, chosen["best single"])
            for map in MAPS:
                gain = interval(replayed(test, [d.expert for d in made[f"{map} 110"].decide_many(test.prompts)]) - best)
                found["llmrouter"][encoder]["resident 110"]["paired"][f"{map} less best single"] = gain
            if encoder != "minilm":
                found["llmrouter"][encoder]["uncertainty"] = rules(train, test, catalog, router, new)
            found["llmrouter"][encoder]["survival"] = survival(
                {n: c for n, c in made.items() if "110" in n}, test.prompts
            )
            shifted = read_table(data / "routerarena_sub10" / "two_models.jsonl")
            found.setdefault("routerarena", {})[encoder] = arena(shifted, test, router, catalog)
            timed |= {f"{encoder} {map}": made[f"{map} 110"] for map in MAPS}
            write_json(OUT, found)
        found["llmrouter"]["cross_validated"] = {"tfidf": cross_validated(train, catalog, "tfidf")}
        found["routellm"] = {
            "gsm8k": routellm(data / "routellm" / "gsm8k_responses.csv", range(5)),
            "mmlu": routellm(data / "routellm" / "mmlu_responses.csv", range(1)),
        }
    found["milliseconds_a_decision"] = speed(timed, test.prompts)
    write_json(OUT, found)
    said("%s", json.dumps(found["milliseconds_a_decision"]))


if __name__ == "__main__":
    main(sys.argv[1:])
