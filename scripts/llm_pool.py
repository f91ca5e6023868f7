"""The local pool of language models, trained and scored: `scripts/llm_pool.py FOLDER [--seeds 0,1,2] [--larger]`.

For each seed the members of `moesaic.llms.pool` are trained on the list tasks, and each answers all of the validation
and of the test rows. By category: of each task the member that validation rows say, the smaller one of equals; the
oracles choose on the test rows themselves, by task and by row. Then a composition is fitted to the validation rows,
with no more active parameters on average than the best single member there has; all members are served over HTTP behind
a gateway, and the test rows are asked of moesaic/coe, sixteen at once.
--larger is of the first seed alone. What is in FOLDER already is not trained again; FOLDER/sN/validation.jsonl and
test.jsonl are tables of outcomes as `moesaic.llms.tables` reads them. Writes results/llm-pool.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesaic.llms.coe.fit import Fitting, fit
from moesaic.llms.coe.observed import Observed
from moesaic.llms.coe.problem import Budget
from moesaic.llms.pool import LARGER, MEMBERS, TASKS, Member, billions, correct, mixed, serving, train, write_rows
from moesaic.runs.folder import write_json, write_text
from moesaic.runs.process import termination_interrupts
from moesaic.runs.results import command_line, versions

ROOT = Path(__file__).parents[1]
AT_ONCE = 16
GATEWAY = """catalog: catalog.yaml
host: 127.0.0.1
port: 0
routers: {coe: composition}
trace: {file: trace.jsonl}
"""
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


def kept(file: Path, members: Sequence[Member]) -> Correct | None:
    """What a table of outcomes says, if it is there and of these members."""
    if not file.is_file():
        return None
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if {*rows[0]["scores"]} != {member.name for member in members}:
        return None
    return {
        member.name: {
            task: [bool(row["scores"][member.name]) for row in rows if row["category"] == task] for task in TASKS
        }
        for member in members
    }


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


@contextmanager
def gateway(place: Path) -> Iterator[str]:
    """Its address for as long; its catalog, composition and log lie in a folder."""
    write_text(place / "gateway.yaml", GATEWAY)
    command = [sys.executable, "-m", "moesaic", "llm", "serve", str(place / "gateway.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            found = re.search(r"http://\S+/v1", said)
            if found is None:
                raise SystemExit(f"the gateway does not come up: {said}")
            yield found[0]
        finally:
            process.terminate()


async def asked(url: str, rows: Sequence[Mapping[str, str]]) -> list[tuple[bool, str, float]]:
    """Of each row whether moesaic/coe answers it exactly, which expert did, and the seconds that the client waited."""
    from openai import AsyncOpenAI

    places = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0) as client:

        async def one(row: Mapping[str, str]) -> tuple[bool, str, float]:
            async with places:
                begun = time.perf_counter()
                raw = await client.chat.completions.with_raw_response.create(
                    model="moesaic/coe", messages=[{"role": "user", "content": row["prompt"]}], max_tokens=16
                )
                said = raw.parse().choices[0].message.content or ""
                right = said.split() == row["completion"].split()
                return right, raw.headers["x-moesaic-model"], time.perf_counter() - begun

        return await asyncio.gather(*map(one, rows))


def routed(
    members: Sequence[Member], runs: Mapping[str, Path], place: Path, rows: Sequence[Mapping[str, str]], budget: Budget
) -> Any:
    """A composition of what the validation rows said, asked through the gateway: whom it asked, and how well it did."""
    with serving(members, runs, place) as catalog:
        recorded = Observed.read(place / "validation.jsonl")
        made = fit(recorded, catalog, budget, Fitting(encoder="tfidf"), out=place / "composition", overwrite=True)
        with gateway(place) as url:
            begun = time.perf_counter()
            found = asyncio.run(asked(url, rows))
            seconds = time.perf_counter() - begun
    return {
        "expert": dict(made.solution.expert), "asked": len(found), "mean": mean([right for right, _, _ in found]),
        "active": mean([catalog[name].active_size for _, name, _ in found]),
        "used": dict(Counter(name for _, name, _ in found).most_common()),
        "seconds": {"all": seconds, "median": statistics.median(waited for _, _, waited in found)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--larger", action="store_true", help="SmolLM2 too, as it is and with two adapters")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    found: dict[str, Any] = {"command": command_line(), "versions": versions(), "seeds": {}}
    for seed in seeds:
        members = [*MEMBERS, *(LARGER if given.larger and seed == seeds[0] else ())]
        place, rows = given.folder / f"s{seed}", mixed(seed)
        write_rows(place / "data", rows)
        runs = train(members, place / "data", place, seed)
        sizes = {member.name: billions(member, runs[member.name]) for member in members}
        scored = {}
        for split in ("validation", "test"):
            known = kept(place / f"{split}.jsonl", members)
            scored[split] = known or correct(members, runs, place / "data", split)
            write_text(place / f"{split}.jsonl", outcomes(rows[split], scored[split]))
        found["seeds"][str(seed)] = figures(scored["validation"], scored["test"], sizes)
        single = max(members, key=lambda m: mean([mean(scored["validation"][m.name][task]) for task in TASKS]))
        budget = Budget(active=sizes[single.name])
        found["seeds"][str(seed)]["through_gateway"] = routed(members, runs, place, rows["test"], budget)
        write_json(ROOT / "results" / "llm-pool.json", found)
        print(json.dumps(found["seeds"][str(seed)]), flush=True)


if __name__ == "__main__":
    with termination_interrupts():
        main()
