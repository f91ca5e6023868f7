"""What whole language models as experts came to: the blocks of docs/coe.md and its picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import Blocks, Pictures, spread, table

from moesaic.llms.coe.frontier import svg

BUDGETS = (24, 60, 110)
ENCODERS = ("tfidf", "minilm", "tfidf+minilm")
MAPS = ("hard", "posterior", "blend")
ARMS = {"backend": "backend, asked directly", "aiohttp": "bare relay, aiohttp", "httpx": "bare relay, httpx",
        "gateway": "**gateway**", "routed": "**gateway, routed**"}  # fmt: skip


def read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / name).read_text(encoding="utf-8"))
    return found


def scored(of: Mapping[str, Any]) -> str:
    return f"{100 * of['mean']:.1f} ± {100 * of['standard_error']:.1f}"


def gained(of: Mapping[str, Any]) -> str:
    """A paired difference in points, with its 95 % interval."""
    low, high = (100 * value for value in of["interval"])
    return f"{100 * of['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def llmrouter(results: Path) -> str:
    """LLMRouter's table, routed by text alone."""
    whole = read(results, "coe.json")
    found = whole["llmrouter"]
    known = [name for name in ENCODERS if name in found]

    def row(name: str, of: Mapping[int, Mapping[str, Any]]) -> list[str]:
        return [name, *(cell for b in BUDGETS for cell in (scored(of[b]), f"{of[b]['average_active']:.1f}"))]

    def at(encoder: str, map: str) -> dict[int, Any]:
        return {b: found[encoder][f"resident {b}"][map] for b in BUDGETS}

    rows = [row(f"{map}, {encoder}", at(encoder, map)) for encoder in known for map in MAPS]
    rows.append(row("true categories", at(known[0], "true categories")))
    rows += [row(name, dict.fromkeys(BUDGETS, of)) for name, of in found["baselines"].items()]
    header = ["who answers", *(text for b in BUDGETS for text in (f"{b} B resident", "active"))]
    new = found["test"] - found["test_prompts_in_train"]
    lines = [
        f"**LLMRouter's table, replayed**: {found['train']:,} prompts to fit, {found['test']} to test, nine models of "
        f"7 to "
        "70 billion, mean score in percent ± standard error over test prompts, by resident budget; beside it billions "
        "of "
        "active parameters on an average prompt. Rows below `true categories` know no budget. All settings are chosen "
        "on "
        "training rows. Command: `python scripts/coe.py`.", "", *table(header, rows), "",
    ]  # fmt: skip
    pairs = ("blend less hard", "posterior less hard", "blend less best single", "posterior less best single")
    rows = [[encoder, *(gained(found[encoder]["resident 110"]["paired"][pair]) for pair in pairs)] for encoder in known]
    lines += [
        "Paired over the test prompts, points and 95 % bootstrap intervals, 110 B resident:", "",
        *table(["encoder", *pairs], rows), "",
    ]  # fmt: skip
    rows = []
    for encoder in known:
        router, kept = found[encoder]["router"], found[encoder]["survival"]
        certain = router["accuracy_of_most_certain"]
        rows.append([
            encoder, f"{100 * router['held_out_accuracy']:.1f}", f"{100 * router['test_accuracy']:.1f}",
            f"{100 * router['test_accuracy_new']:.1f}", *(f"{100 * certain[s]:.1f}" for s in ("90%", "80%", "50%")),
            f"{100 * router['test_calibration_error']:.1f}",
            *(" / ".join(f"{100 * of[edit]:.1f}" for edit in ("typos", "polite prefix"))
              for of in (kept["posterior 110"], kept["blend 110"])),
            f"{whole['milliseconds_a_decision'][f'{encoder} blend']['wall_p50']:.1f}",
        ])  # fmt: skip
    header = ["category router", "accuracy, held out, %", "test, %", "new prompts, %", "surest 90 %", "80 %", "50 %",
              "ECE, test", "posterior survives typos / a prefix, %", "blend", "a decision, ms"]  # fmt: skip
    crossed = found["cross_validated"]["tfidf"]
    gains = ", ".join(f"{gained(crossed[str(b)]['posterior less hard'])} at {b}" for b in BUDGETS)
    blends = ", ".join(f"{gained(crossed[str(b)]['blend less hard'])} at {b}" for b in BUDGETS)
    moved = whole["routerarena"][known[0]]["told_apart"]
    return "\n".join([
        *lines, "The router of the 14 tasks by the prompt's text, its calibration error (ECE) in points, and the share "
        "of "
        "prompts that go to the same expert after an edit (upper case and blank lines change nothing):", "",
        *table(header, rows), "",
        f"{found['test_prompts_in_train']} of the test prompts are among the training prompts too; on the {new} new "
        f"ones "
        f"`blend` has {100 * at(known[-1], 'blend')[110]['new']:.1f} at 110 ({known[-1]}), the best single model "
        f"{100 * found['baselines']['best single']['new']:.1f}. In five folds of the training rows (tfidf), "
        f"`posterior` less "
        f"`hard` is {gains} points; `blend` less `hard` {blends}. On RouterArena's prompts, which are of other kinds, "
        f"distance tells them from ours with an AUROC of {moved['novelty']['auroc']:.2f}, entropy with "
        f"{moved['entropy']['auroc']:.2f}.",
    ])  # fmt: skip


def routellm(results: Path) -> str:
    """Two models, and a share of prompts for the stronger."""
    found = read(results, "coe.json")["routellm"]
    lines, rows = [], []
    for name, of in found.items():
        shares = [of["shares"].index(share) for share in (0.2, 0.5, 0.8)]
        rows += [
            [f"{name}, {router}", spread(had["apgr_by_seed"], 3), f"{had['area']:.3f}",
             *(f"{had['quality'][i]:.3f}" for i in (0, *shares, -1))]
            for router, had in of["routers"].items()
        ]  # fmt: skip
        lines.append(f"{name}: {of['prompts']:,} prompts, {len(of['seeds'])} split{'s' * (len(of['seeds']) > 1)}")
    header = ["table, router", "APGR", "area", *(f"quality at {s}" for s in ("0 %", "20 %", "50 %", "80 %", "100 %"))]
    return "\n".join([
        "**RouteLLM's tables, replayed**: Mixtral-8x7B, and GPT-4 for the share of prompts of which most is expected "
        "to be "
        "gained (three fifths to fit, two fifths to test, tfidf). APGR is the mean share of the gap between the two "
        "that is "
        f"recovered (0.5 is chance), area that under quality by share. {'; '.join(lines)}.", "", *table(header, rows),
    ])  # fmt: skip


def pool(results: Path) -> str:
    """Models that really answer."""
    found = read(results, "llm-pool.json")
    rows = []
    for seed, of in found["seeds"].items():
        through = of["through_gateway"]
        for name, member in of["members"].items():
            rows.append([seed, name, f"{100 * member['mean']:.1f}", f"{1000 * member['parameters']:.2f}", ""])
        rows.append([
            seed, "**composition, through the gateway**", f"{100 * through['mean']:.1f}",
            f"{1000 * through['active']:.2f}", f"{through['seconds']['median']:.2f}",
        ])  # fmt: skip
        rows.append([seed, "oracle by row", f"{100 * of['oracle_by_row']:.1f}", "", ""])
    asked = next(iter(found["seeds"].values()))["through_gateway"]["asked"]
    header = ["seed", "who answers", "exact match, %", "active, million", "median s"]
    return "\n".join([
        f"**A pool that really answers**: adapters of nano on list tasks, three of two tasks each and one of all six "
        f"with six "
        f"times the rank (first seed: SmolLM2-135M as it is and with two adapters beside them), each behind HTTP, and "
        f"`moesaic/coe` in front of them, fitted to 600 validation rows; {asked} test rows, 16 at once. Command: "
        f"`python scripts/{found['command']}`.", "", *table(header, rows),
    ])  # fmt: skip


def gateway(results: Path) -> str:
    """What a request costs."""
    found = read(results, "gateway_speed.json")
    names = list(dict.fromkeys(row["target"] for row in found["table"]))
    of = {(r["target"], r["stream"], r["at_once"]): r for r in found["table"]}
    rows = [
        [ARMS.get(name, name), *(f"{of[name, stream, n]['cpu_ms']:.2f}" for stream in (False, True) for n in (1, 16)),
         *(f"{of[name, stream, 1]['added_p50_ms']:.2f}" for stream in (False, True)),
         *(f"{of[name, stream, 16]['requests_per_second']:,.0f}" for stream in (False, True))]
        for name in names
    ]  # fmt: skip
    header = ["server", "CPU ms, one by one", "16 at once", "streamed", "streamed, 16", "added p50, ms", "streamed",
              "requests/s, 16 at once", "streamed"]  # fmt: skip
    return "\n".join([
        "**What the gateway costs a request**, with a key, a budget and a trace on, in front of one mock backend (32 "
        "words; "
        "streamed, an event a word); medians over rounds in which all take turns. Command: "
        f"`{found['command']}`.", "", *table(header, rows), "", *_peers(found, of),
    ])  # fmt: skip


def _peers(found: Mapping[str, Any], of: Mapping[tuple[str, bool, int], Mapping[str, Any]]) -> list[str]:
    """What is to be known of other gateways."""
    if ("litellm", False, 16) not in of:
        return []
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("litellm", "portkey", "switchyard"))
    less = of["litellm", False, 1]["cpu_ms"] / of["gateway", False, 1]["cpu_ms"]
    more = of["gateway", False, 16]["requests_per_second"] / of["litellm", False, 16]["requests_per_second"]
    return [
        f"{versions}, one process each, as `python scripts/gateway_peers.py FOLDER` sets them up. The gateway takes "
        f"{less:.0f} times less CPU than LiteLLM's proxy and answers {more:.0f} times as many requests a second. The "
        f"others do "
        "less: LiteLLM checks one key (its budgets need a database), Portkey and Switchyard none. Two latencies are "
        "waits, no "
        "work: Portkey sleeps 25 ms before a stream, and Switchyard's streams wait for delayed acknowledgements."
    ]


def residency(results: Path) -> str:
    """Measured under a cap of memory."""
    found = read(results, "llm-residency.json")["measured"]
    rows = [
        [name, f"{of['hits']}", f"{of['loads']}", f"{of['evictions']}", f"{of['waited']:.1f}", f"{of['seconds']:.1f}",
         f"{of['process_bytes'] / 2**20:,.0f}"]
        for name, of in found.items() if isinstance(of, dict) and "waited" in of
    ]  # fmt: skip
    header = ["policy", "hits", "loads", "evictions", "waited, s", "all, s", "process, MiB"]
    return "\n".join([
        f"**Five local models under a cap that holds three**: {found['requests']} requests one by one, each model "
        f"really "
        "loaded from a warm page cache. Command: `python scripts/llm_residency.py FOLDER`.", "", *table(header, rows),
    ])  # fmt: skip


def frontier(results: Path) -> str:
    """Expected on training rows, and replayed on test rows, by true categories."""
    points = read(results, "coe-mapping.json")["frontiers"]["resident"]
    return svg({
        "training prompts, expected": [(p["limit"], p["score"]) for p in points],
        "test prompts, replayed": [(p["limit"], p["test"]) for p in points],
    })  # fmt: skip


BLOCKS: Blocks = {
    "coe.md": {
        "llmrouter": ("coe.json", llmrouter), "routellm": ("coe.json", routellm), "pool": ("llm-pool.json", pool),
        "gateway": ("gateway_speed.json", gateway), "residency": ("llm-residency.json", residency),
    }
}  # fmt: skip
PICTURES: Pictures = {"coe.svg": ("coe-mapping.json", frontier)}
