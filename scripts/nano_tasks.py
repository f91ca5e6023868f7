"""Writes the six list tasks of `moesaic demo` as data for other runs: `python scripts/nano_tasks.py FOLDER`.

`--cue` says where the word that names the task stands, as in `moesaic.nano.tasks`: the lists are the same.
2000 training, 150 validation and 150 test lists a task; no list of the latter two is in the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moesaic.nano.tasks import PROMPTS, Cue, make_split

HELD_OUT = 150


def write(folder: Path, *, seed: int = 0, cue: Cue = "last") -> None:
    train, held_out = make_split(2000, 2 * HELD_OUT, seed, cue=cue)
    tasks = {row["task"] for row in train}
    for task in sorted(tasks):
        (folder / task).mkdir(parents=True, exist_ok=True)
        own = [row for row in held_out if row["task"] == task]
        splits = {
            "train": [row for row in train if row["task"] == task],
            "validation": own[:HELD_OUT],
            "test": own[HELD_OUT:],
        }
        for split, rows in splits.items():
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cue", choices=list(PROMPTS), default="last")
    given = parser.parse_args()
    write(given.folder, cue=given.cue)
