"""`moesaic topics build | show`: TopicLoRA's first stage from the command line."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, path_of, suggest
from moesaic.lora.methods.topics.settings import TopicSettings
from moesaic.runs.folder import check_writable, write_text

if TYPE_CHECKING:
    from moesaic.lora.methods.topics.artefact import Topics

logger = logging.getLogger(__name__)

ACTIONS = ("build", "show")

_ABOUT = """A topic is what a task is about; the graph of topics says which experts a prompt calls for.

  moesaic topics show                                            the topics that come along, and their experts
  moesaic topics show out=graph.svg                              the graph as a picture
  moesaic topics build tasks=mine.json out=mine.safetensors      your own tasks: {"task": ["keyword", ...], ...}
  moesaic train topiclora data=tasks/ adapter.topics=mine.safetensors"""


@dataclass
class BuildSettings(TopicSettings):
    """Where stage 1 is written, and how it is done."""

    out: str = field(default="topics.safetensors", metadata={"help": "the file to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace it if it is there"})


@dataclass
class ShowSettings:
    """What of the graph is written."""

    out: str = field(default="", metadata={"help": "an .svg file to draw the graph into"})


@verb(
    "topics",
    "TopicLoRA's topics: build a file of your own, or look at one",
    group="mixtures",
    place=55,
    settings=[
        Section(BuildSettings, "settings of build (key=value):"),
        Section(ShowSettings, "settings of show (key=value):"),
    ],
    operands={"action": "build or show"},
    takes="FILE | key=value",
    about=lambda: _ABOUT,
)
def run(action: str, arguments: list[str], *, as_json: bool = False) -> None:
    """Raises ConfigError or DataError, and nothing is written then."""
    if action not in ACTIONS:
        raise ConfigError(f"topics {action}: no such action; {suggest(action, ACTIONS)}")
    names, settings = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    if action == "build" and names:
        raise ConfigError(f"'{names[0]}' is not of the form key=value; the file to write is out={names[0]}")
    if len(names) > 1:
        raise ConfigError(f"one topics file at a time, not {len(names)}: {' '.join(names)}")
    topics, written = _build(settings) if action == "build" else _show(names[0] if names else None, settings)
    from moesaic.report import topics as drawing

    if as_json:
        facts = {
            **topics.facts,
            "doubts": topics.doubts(),
            "settings": asdict(topics.settings),
            "topics": drawing.rows(topics),
        }
        print_json({"file": written, **facts})
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if action == "show":
        console.print(drawing.table(topics))
    else:
        console.print(drawing.caption(topics), soft_wrap=True)
    doubts = topics.doubts()
    for line in doubts:
        logger.warning("%s", line)
    if written:
        console.print(f"written: {written}", soft_wrap=True)
    if action == "build" and not doubts:
        experts, size = topics.prototypes.shape
        console.print(
            f"next: moesaic train topiclora data=… adapter.topics={written} adapter.num_experts={experts} "
            f"adapter.topic_dim={size}",
            soft_wrap=True,
        )


def _build(arguments: list[str]) -> tuple[Topics, str]:
    from moesaic.runs.recipe import parse_settings

    given = parse_settings(BuildSettings, arguments)
    file = _to_write(given.out)
    if file.exists() and not given.overwrite:
        raise ConfigError(f"out={file} is already there; overwrite=true replaces it")
    from moesaic.lora.methods.topics import vocabulary
    from moesaic.lora.methods.topics.artefact import build

    settings = TopicSettings(**{f.name: getattr(given, f.name) for f in fields(TopicSettings)})
    topics = build(settings)
    topics.save(file)
    if settings.tasks and settings.level == "keyword":
        lone = vocabulary.load(settings.vocabulary, settings.tasks).lone()
        if lone:
            logger.warning("left out, since one task alone carries them: %s", ", ".join(lone))
    return topics, str(file)


def _show(file: str | None, arguments: list[str]) -> tuple[Topics, str]:
    from moesaic.runs.recipe import parse_settings

    out = parse_settings(ShowSettings, arguments).out
    if out and Path(out).suffix != ".svg":
        raise ConfigError(f"out={out} must end in .svg")
    place = _to_write(out) if out else None
    from moesaic.lora.methods.topics.artefact import Topics, build

    topics = Topics.load(file) if file else build()
    if place:
        from moesaic.report import topics as drawing

        write_text(place, drawing.svg(topics))
    return topics, out


def _to_write(out: str) -> Path:
    """The file that the setting `out` names. Raises ConfigError where none can be made there."""
    if not out:
        raise ConfigError("out is empty: name the file to write")
    file = path_of(out)
    if file.exists() and not file.is_file():
        raise ConfigError(f"out={out} is a {'folder' if file.is_dir() else 'device'}; name a file")
    if not file.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {file.parent}")
    check_writable(file, f"out={out}")
    return file
