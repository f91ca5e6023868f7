"""The command line: `moesaic <verb> [recipe] key=value …`. Help answers without importing torch."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from moesaic import __version__
from moesaic.errors import MoesaicError, first_line

_EXAMPLES = """settings are given as key=value; examples:
  moesaic demo                                                   plain LoRA against HotMoE in minutes
  moesaic methods                                                what can be trained
  moesaic methods mola                                           its paper, equations, recipes and settings
  moesaic train hotmoe model=minilm data=tasks/ steps=800        a packaged recipe, settings on top
  moesaic train lora match=hotmoe model=minilm data=tasks/       plain LoRA with as many trainable parameters
  moesaic train my.yaml adapter.num_experts=16 --dry-run         your own recipe, printed, not run
  moesaic eval runs/hotmoe-minilm-s0 runs/lora-minilm-s0         scores side by side, the untrained base beside them
  moesaic compose adapters=a/,b/ method=arrow out=composed       route LoRA adapters that are trained already
  moesaic inspect composed prompt='SELECT name FROM'             which of them answers, and why
  moesaic compare methods=lora,mola,hotmoe data=tasks/           equal parameters, several seeds, controls, a report
"""


_TOPICS = """A topic is what a task is about; the graph of topics says which experts a prompt calls for.

  moesaic topics show                                            the topics that come along, and their experts
  moesaic topics show out=graph.svg                              the graph as a picture
  moesaic topics build tasks=mine.json out=mine.safetensors      your own tasks: {"task": ["keyword", ...], ...}
  moesaic train topiclora data=tasks/ adapter.topics=mine.safetensors

settings of build (key=value):
  out            the file to write [topics.safetensors]
  overwrite      replace it if it is there [false]
  tasks          JSON files: task -> its keywords, and keywords of your own
  vocabulary     bigbench, or a vocabulary's JSON file [bigbench]
  level          what a topic is: keyword or group [keyword]
  encoder        minilm, hashing, or an encoder's folder or hub id [minilm]
  num_experts    experts to place among the topics [8]
  topic_dim      size of a prototype [64]
  seed           of weights, clusters, dropout and sampled pairs [0]
  steps          steps of Adam [300]
  jaccard        weight of shared tasks in an edge [1.0]
  cosine         weight of similar descriptions in an edge [0.5]
  group          weight of a common group in an edge [0.25]
  separation     weight of the term that parts the prototypes [1.0]
settings of show:
  out            an .svg file to draw the graph into"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if cells of a comparison are not done, 2 for a mistake that can be
    mended, 130 when interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv, argparse.Namespace(json=False, verbose=False))
    if rest:  # argparse gives up on arguments that follow an option: `… lr=1e-3 --dry-run steps=9`
        if not hasattr(args, "settings") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.settings += rest
    if args.verb is None:
        parser.print_help()
        return 0
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    _quiet_libraries(args.verbose)
    try:
        return args.run(args) or 0
    except MoesaicError as error:
        print(f"moesaic: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"moesaic: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"moesaic: {first_line(error)}", file=sys.stderr)
        return 2


def _quiet_libraries(verbose: bool) -> None:
    """Other libraries' bars are for terminals, and their deprecation notices for us."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print JSON for machines")
    common.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    parser = argparse.ArgumentParser(
        prog="moesaic",
        description="Turn what you have into a routed mixture of experts, and see what the router did.",
        epilog=_EXAMPLES,
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moesaic {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, run: Any, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    methods = verb("methods", _methods, "list the methods that can be trained, or tell all of one")
    methods.add_argument("name", nargs="?", help="a method: its paper, equations, recipes and settings")
    train = verb("train", _train, "fine-tune a model by a recipe, or continue an interrupted run", _train_epilog())
    train.add_argument("recipe", help="a packaged recipe's name, or the path of a .yaml file")
    train.add_argument("settings", nargs="*", metavar="key=value", help="put on top of the recipe")
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    evaluate = verb("eval", _eval, "score finished runs on held-out rows", _eval_epilog())
    evaluate.add_argument("settings", nargs="+", metavar="run | key=value", help="run folders, then settings")
    compare = verb("compare", _compare, "compare methods at equal budget over seeds", _compare_epilog())
    compare.add_argument(
        "settings",
        nargs="*",
        metavar="FILE | FOLDER | key=value",
        help="a .yaml file, or a comparison's folder to go on with; settings on top",
    )
    compare.add_argument("--dry-run", action="store_true", help="print the arms, their ranks and counts, and stop")
    compose = verb("compose", _compose, "route LoRA adapters that are trained already", _compose_epilog())
    compose.add_argument("settings", nargs="*", metavar="key=value", help="adapters=a/,b/ and settings")
    export = verb("export", _export, "write one expert, or a static mixture, as a plain LoRA adapter", _export_epilog())
    export.add_argument("folder", help="a folder of `moesaic compose`")
    export.add_argument("settings", nargs="*", metavar="key=value", help="settings of the export")
    inspect = verb("inspect", _inspect, "show which experts answer a prompt, and why", _inspect_epilog())
    inspect.add_argument("folder", help="a run folder")
    inspect.add_argument("settings", nargs="*", metavar="key=value", help="prompt='…'")
    demo = verb("demo", _demo, "plain LoRA against HotMoE on six small tasks, in minutes", _demo_epilog())
    demo.add_argument("settings", nargs="*", metavar="key=value", help="settings of the demo")
    bench = verb("bench", _bench, "measure speed and memory against plain LoRA", _bench_epilog())
    bench.add_argument("settings", nargs="*", metavar="key=value", help="settings of the benchmark")
    topics = verb("topics", _topics, "TopicLoRA's topics: build a file of your own, or look at one", _TOPICS)
    topics.add_argument("action", help="build or show")
    topics.add_argument("settings", nargs="*", metavar="file | key=value", help="the file to show, then settings")
    return parser


def _train_epilog() -> str:
    from moesaic.runs.recipe import Recipe, packaged

    return f"packaged recipes: {', '.join(packaged())}\n\n{_settings_of(Recipe)}"


def _compare_epilog() -> str:
    from moesaic.compare.settings import BY_CELL, CompareSettings
    from moesaic.runs.recipe import Recipe

    return f"""{_settings_of(CompareSettings)}

settings of every run, as for `moesaic train`:
  {", ".join(f.name for f in fields(Recipe) if f.name not in BY_CELL)}"""


def _compose_epilog() -> str:
    from moesaic.cli.compose import ComposeSettings

    return _settings_of(ComposeSettings)


def _export_epilog() -> str:
    from moesaic.cli.export import ExportSettings

    return _settings_of(ExportSettings)


def _inspect_epilog() -> str:
    from moesaic.cli.inspect import InspectSettings

    return _settings_of(InspectSettings)


def _demo_epilog() -> str:
    from moesaic.cli.demo import DemoSettings

    return _settings_of(DemoSettings)


def _bench_epilog() -> str:
    from moesaic.bench import BenchSettings

    return _settings_of(BenchSettings)


def _settings_of(cls: Any) -> str:
    """The fields of a settings dataclass with their help and default, a line each."""
    lines = ["settings (key=value):"]
    for f in fields(cls):
        shown = "" if callable(f.default_factory) or f.default in ("", None) else f" [{f.default}]"
        lines.append(f"  {f.name:<14} {f.metadata['help']}{shown}")
    return "\n".join(lines)


def _eval_epilog() -> str:
    return """settings (key=value), the run's own where left out:
  split          train, validation or test [validation]
  data           other data
  tasks          which tasks, comma-separated
  limit          rows a task, for a quick look
  batch_size     rows in a forward [32]
  base           also score the untrained base [true]"""


def _methods(args: argparse.Namespace) -> None:
    from moesaic.cli import methods
    from moesaic.report.tables import methods_table

    if args.name:
        about = methods.describe(args.name)
        _print_json(about) if args.json else _show(methods.shown(about))
    else:
        rows = methods.overview()
        _print_json(rows) if args.json else _show(methods_table(rows))


def _train(args: argparse.Namespace) -> None:
    from moesaic.runs.recipe import as_used, dump, load_recipe

    recipe = load_recipe(args.recipe, args.settings)
    if args.dry_run:
        from moesaic.training.wrapping import check_teacher

        check_teacher(recipe)
        if recipe.match:
            from moesaic.training.run import resolved

            recipe = resolved(recipe)
        print(dump(as_used(recipe)), end="")
        return
    from moesaic.training.run import train

    results = train(recipe)
    if args.json:
        _print_json({"run": str(recipe.run_folder()), **results})
        return
    folder, loss = recipe.run_folder(), results["final_loss"]
    if results["steps"]:
        print(
            f"{folder}: {results['steps']} steps in {results['train_seconds']:.0f} s "
            f"({results['tokens_per_second']:.0f} tokens/s), {results['trainable_parameters']:,} trainable parameters, "
            f"last loss {'unknown' if loss is None else f'{loss:.3f}'}"
        )
    if results.get("found"):
        print(f"{folder}: {results['found']}")
    rows = "" if Path(recipe.data).is_dir() else " data=HELD_OUT_ROWS"
    print(f"next: moesaic eval {folder}{rows}")


def _eval(args: argparse.Namespace) -> None:
    from moesaic.runs.recipe import parse_settings

    runs = [a for a in args.settings if "=" not in a]
    if not runs:
        raise MoesaicError("name at least one run folder, such as runs/hotmoe-minilm-s0")
    from moesaic.evaluation.run import EvalSettings, check_run, evaluate_run

    settings = parse_settings(EvalSettings, [a for a in args.settings if "=" in a])
    for run in runs:
        check_run(run)
    results = [evaluate_run(run, settings, progress=sys.stderr.isatty()) for run in runs]
    if args.json:
        _print_json(results)
        return
    from moesaic.report.tables import eval_table, routing_table

    _show(eval_table(results))
    routing = routing_table(results)
    if routing is not None:
        _show(routing)


def _compare(args: argparse.Namespace) -> int:
    from moesaic.compare.run import run

    return run(args.settings, dry_run=args.dry_run, as_json=args.json)


def _compose(args: argparse.Namespace) -> None:
    from moesaic.cli.compose import run_compose

    run_compose(args.settings, as_json=args.json)


def _export(args: argparse.Namespace) -> None:
    from moesaic.cli.export import run_export

    run_export(args.folder, args.settings, as_json=args.json)


def _inspect(args: argparse.Namespace) -> None:
    from moesaic.cli import inspect as explain

    explain.run(args.folder, args.settings, as_json=args.json)


def _demo(args: argparse.Namespace) -> None:
    from moesaic.cli import demo

    demo.run(args.settings, as_json=args.json)


def _bench(args: argparse.Namespace) -> None:
    from moesaic import bench

    bench.main(args.settings, as_json=args.json)


def _topics(args: argparse.Namespace) -> None:
    from moesaic.cli import topics

    topics.run(args.action, args.settings, as_json=args.json)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _show(table: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
