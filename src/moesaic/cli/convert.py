"""`moesaic convert`: feed-forward layers of a model that is trained already, made of experts."""

from __future__ import annotations

from moesaic.cli.show import print_json, show
from moesaic.cli.verbs import Section, verb
from moesaic.runs.conversion import Conversion, load_conversion

_ABOUT = """methods (`moesaic methods convert/NAME` tells equations and settings):
  read-me        an expert for each domain of text, and one router before the model runs (Cai et al. 2024)
  cmoe           shared experts by activation rates, the rest clustered: no training (Pei et al. 2025)
  smoe-dropout   equal slices behind a fixed random router, for training with growing k (Chen et al. 2023)
  rmoe           routers linked over depth, for models that are mixtures: Mixtral, Qwen3-MoE, OLMoE (Qiu et al. 2025)

  moesaic convert read-me model=smollm2 domains=stdlib,pydoc,data/gsm8k
  moesaic convert cmoe model=smollm2 domains=stdlib,pydoc experts.num_experts=8 experts.top_k=4
  moesaic convert smoe-dropout model=nano experts.combine=sum"""


@verb(
    "convert",
    "make experts of a model's feed-forward layers",
    group="feed-forward layers",
    place=84,
    settings=[Section(Conversion, but=("method",))],
    operands={"method": "read-me, cmoe, smoe-dropout or rmoe"},
    about=lambda: _ABOUT,
)
def run(method: str, arguments: list[str], *, as_json: bool = False) -> None:
    """Raises MoesaicError of the kind that fits; nothing is written then but rounds that are done."""
    wanted = load_conversion(method, arguments)
    from moesaic.training.conversion import convert

    results = convert(wanted)
    if as_json:
        print_json(results)
        return
    from moesaic.report.tables import perplexity_table

    count = results["parameters"]
    if results["before"]:
        rows = f"{results['held_out']} rows of {results['length']} tokens at most"
        show(perplexity_table({"before": results["before"], "after": results["after"]}, rows))
    print(
        f"{wanted.out}: {method}, {count['before']:,} parameters before, {count['after']:,} after, of which a token "
        f"uses {count['active']:,}"
    )
    if results["before"]:
        print(f"what the routers do: {wanted.out}/report.html")
    asked = "" if results["before"] else " domains=TEXT"
    print(f"next: moesaic perplexity {wanted.model} {wanted.out}{asked}, or moesaic.ffn.load({wanted.out!r}) in Python")
