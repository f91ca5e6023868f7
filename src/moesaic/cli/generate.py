"""`moesaic generate`: one answer of a mixture, as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesaic.cli.inspect import show_routed, with_prompt
from moesaic.cli.show import print_json
from moesaic.cli.verbs import Section, verb
from moesaic.errors import ConfigError, DataError, path_of
from moesaic.runs.process import standard_input

if TYPE_CHECKING:
    from moesaic.data.examples import Example
    from moesaic.training.prepared import Prepared


@dataclass
class GenerateSettings:
    """Settings of `moesaic generate`."""

    prompt: str = field(default="", metadata={"help": "what is answered; - reads it from standard input"})
    messages: str = field(default="", metadata={"help": "a chat instead: JSON, a file of it, or - for standard input"})
    task: str = field(default="", metadata={"help": "its task, for methods that are told"})
    max_tokens: int | None = field(default=None, metadata={"help": "of the answer; all there is room for, up to 512"})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest tokens"})
    top_p: float = field(default=1.0, metadata={"help": "draw of the likeliest that together have this probability"})
    seed: int = field(default=0, metadata={"help": "of what is drawn"})
    stop: list[str] = field(default_factory=list, metadata={"help": "texts before which the answer ends"})
    routing: bool = field(default=False, metadata={"help": "show which expert each token went to"})
    model: str = field(default="", metadata={"help": "the base model, where a folder names none or it has moved"})
    prompts: str = field(default="", metadata={"help": "chat: in the tokenizer's chat template; plain: as written"})


@verb(
    "generate",
    "answer a prompt or a chat with a run, a composition or an adapter",
    group="mixtures",
    place=46,
    settings=[Section(GenerateSettings)],
    operands={"folder": "of a run, or of an adapter that PEFT, Trainer or SFTTrainer saved"},
    takes="PROMPT | key=value",
)
def run(folder: str, arguments: Sequence[str], *, as_json: bool = False) -> None:
    """Write an answer on stdout as it comes. Raises MoesaicError of the kind that fits."""
    from moesaic.evaluation.opening import load, open_adapter

    settings = with_prompt(GenerateSettings, arguments)
    given = _given(settings)
    from moesaic.serving.asking import check_answers

    prepared = load(open_adapter(folder, model=settings.model, prompts=settings.prompts))
    check_answers(prepared)
    found = answer(prepared, given, settings, aloud=not as_json)
    if as_json:
        print_json(found)
    elif found["routing"]:
        show_routed(found["routing"])


def answer(prepared: Prepared, given: str, settings: GenerateSettings, *, aloud: bool = False) -> dict[str, Any]:
    """Answer, and say where the tokens went.

    Args:
        given: the prompt, or where `settings` has messages, their JSON.
        aloud: write the answer on stdout as it comes.

    Returns:
        prompt: what the model was given, answer, finish_reason ("stop" or "length"), usage (tokens), routing (of prompt
        and answer; None where it was not asked for).
    """
    from transformers import set_seed

    from moesaic.data.causal import prompt_text
    from moesaic.evaluation.routed import check_routed
    from moesaic.serving.answer import Written
    from moesaic.serving.asking import asked, of_prompt, read_messages
    from moesaic.serving.engine import write

    if settings.routing:
        check_routed(prepared)
    example: Example = read_messages(given) if settings.messages else of_prompt(prepared, given)
    question = asked(
        prepared, example, max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p,
        stops=tuple(settings.stop), task=settings.task,
    )  # fmt: skip
    written, pieces = Written(prepared, question), list[str]()

    def say(piece: str) -> None:
        pieces.append(piece)
        if aloud:
            print(piece, end="", flush=True)

    def heard(token: int) -> bool:
        say(written.text.push(token))
        return not written.text.stopped

    set_seed(settings.seed)
    write(prepared, question, heard)
    say(written.end())
    if aloud:
        print()
    return {
        "prompt": prompt_text(example, prepared.base.tokenizer),
        "answer": "".join(pieces),
        "finish_reason": written.finish,
        "usage": written.usage(),
        "routing": written.routed() if settings.routing else None,
    }


def _given(settings: GenerateSettings) -> str:
    """The prompt, or the JSON of messages. Raises ConfigError, DataError where there is none of them, or both."""
    if bool(settings.prompt.strip()) == bool(settings.messages.strip()):
        raise ConfigError("prompt='…' is what is answered, or messages='[{\"role\": …}]' a chat: give one of them")
    text = settings.prompt or settings.messages
    if text == "-":
        text = standard_input()
    elif settings.messages and not text.lstrip().startswith(("[", "{")):
        try:
            text = path_of(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"messages={settings.messages}: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise ConfigError("standard input holds nothing to answer")
    return text
