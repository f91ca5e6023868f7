"""Writes the six list tasks of `moesaic demo` as data for other runs: `python scripts/nano_tasks.py FOLDER`.

2000 training, 150 validation and 150 test lists a task; no list of the latter two is in the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moesaic.nano.tasks import make_split

HELD_OUT = 150


def write(folder: Path, *, seed: int = 0) -> None:
    train, held_out = make_split(2000, 2 * HELD_OUT, seed)
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
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
