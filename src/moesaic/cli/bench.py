"""`moesaic bench`."""

from __future__ import annotations

from moesaic.bench import BenchSettings, main
from moesaic.cli.verbs import Section, verb


@verb(
    "bench",
    "measure speed and memory against plain LoRA",
    group="what it costs",
    place=90,
    settings=[Section(BenchSettings)],
)
def run(arguments: list[str], *, as_json: bool = False) -> None:
    main(arguments, as_json=as_json)
