"""The local pool of language models, trained and scored: `scripts/llm_pool.py FOLDER [--seeds 0,1,2] [--larger]`.

For each seed the members of `moesaic.llms.pool` are trained on the list tasks, and each answers all of the validation
and of the test rows. By category: of each task the member that validation rows say, the smaller one of equals; the
oracles choose on the test rows themselves, by task and by row. Of the first seed all members are served over HTTP, and
some test rows are asked there too. What is in FOLDER already is not trained again; FOLDER/sN/validation.jsonl and
test.jsonl are tables of outcomes as `moesaic.llms.tables` reads them. Writes results/llm-pool.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.llms.pool import LARGER, MEMBERS, TASKS, Member, ask, billions, correct, mixed, serving, train, write_rows
from moesaic.runs.folder import write_json, write_text
from moesaic.runs.process import termination_interrupts
from moesaic.runs.results import command_line, versions

ROOT = Path(__file__).parents[1]
ASKED = 4
"""Test rows a task that are asked over HTTP."""
Correct = Mapping[str, Mapping[str, Sequence[bool]]]
"""By member and task."""


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def outcomes(rows: Sequence[Mapping[str, str]], found: Correct) -> str:
    """A table of outcomes, a line a row."""
    seen = dict.fromkeys(TASKS, 0)
    lines = []
    for row in rows:
        task = row["task"]
        scores = {name: float(by_task[task][seen[task]]) for name, by_task in found.items()}
        lines.append(json.dumps({"prompt": row["prompt"], "category": task, "scores": scores}) + "\n")
        seen[task] += 1
    return "".join(lines)


def figures(validation: Correct, test: Correct, sizes: Mapping[str, float]) -> dict[str, Any]:
    """Exact match of each member and of what is chosen among them; tasks have as many rows each."""
    members: dict[str, Any] = {
        name: {
            "parameters": sizes[name],
            "by_task": {task: mean(by_task[task]) for task in TASKS},
            "mean": mean([mean(by_task[task]) for task in TASKS]),
        }
        for name, by_task in test.items()
    }
    single = max(members, key=lambda name: float(members[name]["mean"]))
    chosen = {task: max(sizes, key=lambda name: (mean(validation[name][task]), -sizes[name])) for task in TASKS}
    best = {task: max(mean(test[name][task]) for name in sizes) for task in TASKS}
    rows = [any(said) for task in TASKS for said in zip(*(test[name][task] for name in sizes), strict=True)]
    return {
        "members": members,
        "best_single": {"name": single, "mean": members[single]["mean"], "active": sizes[single]},
        "by_category": {
            "expert": chosen,
            "mean": mean([mean(test[name][task]) for task, name in chosen.items()]),
            "active": mean([sizes[name] for name in chosen.values()]),
        },
        "oracle_by_category": mean(list(best.values())),
        "oracle_by_row": mean(rows),
    }


def over_http(
    members: Sequence[Member], runs: Mapping[str, Path], folder: Path, rows: Sequence[Any], test: Correct
) -> Any:
    """What members answer when they are asked over HTTP, beside what they answered in this process."""
    begun = time.perf_counter()
    with serving(members, runs, folder) as catalog:
        started = time.perf_counter() - begun
        same, seconds = [], []
        for name, model in catalog.items():
            for at, row in enumerate(rows[: ASKED * len(TASKS)]):
                asked = time.perf_counter()
                said = ask(model.endpoint, name, row["prompt"])
                seconds.append(time.perf_counter() - asked)
                right = said.split() == row["completion"].split()
                same.append(right == test[name][row["task"]][at // len(TASKS)])
    return {"asked": len(same), "as_in_process": sum(same), "seconds": statistics.median(seconds), "started": started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--larger", action="store_true", help="SmolLM2 too, as it is and with two adapters")
    given = parser.parse_args()
    members = [*MEMBERS, *(LARGER if given.larger else ())]
    found: dict[str, Any] = {"command": command_line(), "versions": versions(), "seeds": {}}
    for seed in map(int, given.seeds.split(",")):
        place, rows = given.folder / f"s{seed}", mixed(seed)
        write_rows(place / "data", rows)
        runs = train(members, place / "data", place, seed)
        sizes = {member.name: billions(member, runs[member.name]) for member in members}
        scored = {split: correct(members, runs, place / "data", split) for split in ("validation", "test")}
        for split, by_member in scored.items():
            write_text(place / f"{split}.jsonl", outcomes(rows[split], by_member))
        found["seeds"][str(seed)] = figures(scored["validation"], scored["test"], sizes)
        if "http" not in found:
            found["http"] = over_http(members, runs, place, rows["test"], scored["test"])
        write_json(ROOT / "results" / "llm-pool.json", found)
        print(json.dumps(found["seeds"][str(seed)]), flush=True)


if __name__ == "__main__":
    with termination_interrupts():
        main()
