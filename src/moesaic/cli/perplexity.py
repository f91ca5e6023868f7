"""`moesaic perplexity`."""

from __future__ import annotations

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError
from moesaic.evaluation.perplexity import PerplexitySettings

_ABOUT = """  moesaic perplexity smollm2 converted domains=stdlib,pydoc       a model before and after, side by side
  moesaic perplexity runs/smoe-dropout-s0 top_k=1,2,4,8,16          one that is slimmed by taking fewer experts"""


@verb(
    "perplexity",
    "held-out text by domain: models side by side, or one at several k",
    group="feed-forward layers",
    place=86,
    settings=[Section(PerplexitySettings)],
    takes="MODEL | key=value",
    about=lambda: f"takes models and folders, then settings\n\n{_ABOUT}",
)
def run(arguments: list[str], *, as_json: bool = False) -> None:
    from moesaic.evaluation.perplexity import perplexities
    from moesaic.runs.recipe import parse_settings

    models = [a for a in arguments if "=" not in a]
    if not models:
        raise ConfigError("name at least one model, such as nano or converted/")
    found = perplexities(models, parse_settings(PerplexitySettings, [a for a in arguments if "=" in a]))
    if as_json:
        print_json(found)
        return
    from moesaic.report.tables import perplexity_table

    show(perplexity_table(found))
