"""Pages and pictures of docs/ that are made of results/."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Make = Callable[[Path], str]
"""From results/ to a text; to none where what it shows is not there yet."""
Blocks = Mapping[str, Mapping[str, tuple[str, Make]]]
"""Page -> block -> what it is made of, within results/, and how."""
Pictures = Mapping[str, tuple[str, Make]]


def filled(blocks: Blocks, page: str, text: str, results: Path) -> str:
    """A page's text with its blocks made anew."""
    for name, (source, make) in blocks[page].items():
        if (results / source).exists():
            head, mark, rest = text.partition(f"<!-- {name} -->\n")
            assert mark, f"{page} has no block {name}"
            text = f"{head}{mark}{make(results)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def drawn(pictures: Pictures, results: Path) -> dict[str, str]:
    """By file name."""
    made = {name: make(results) for name, (source, make) in pictures.items() if (results / source).exists()}
    return {name: text for name, text in made.items() if text}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several, the sample's standard deviation."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def seeds(counts: Iterable[int]) -> str:
    """How many seeds cells have: `3 seeds`, `1 to 3 seeds`."""
    low, high = min(known := set(counts)), max(known)
    return f"{low if low == high else f'{low} to {high}'} seed{'s' * (high > 1)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; all columns but the first are numbers."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]
