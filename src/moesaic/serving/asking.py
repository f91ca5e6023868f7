"""What a language model is asked: tokens, how many it may answer, how they are drawn, and what ends them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesaic.data.causal import prompt_ids
from moesaic.data.examples import Example
from moesaic.errors import ConfigError, DataError
from moesaic.evaluation.answers import check_known, ends

if TYPE_CHECKING:
    from moesaic.training.prepared import Prepared

COLDEST = 1e-3
"""The least temperature above 0: logits are divided by it, and must stay numbers."""
MOST_STOPS, LONGEST_STOP = 16, 500

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        ids: the prompt's tokens.
        max_tokens: of the answer, at most.
        temperature: 0 takes the likeliest token each time. top_p: tokens are drawn of the likeliest that together
            have this probability.
        ends: tokens at which the answer ends; none of its text.
        stops: texts before which it ends.
        task: for methods that are told each row's.
    """

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    task: str = ""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        check_temperature(self.temperature)
        if len(self.stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in self.stops):
            raise ConfigError(f"stop holds {MOST_STOPS} texts of {LONGEST_STOP} characters at most")
        if not all(self.stops):
            raise ConfigError("stop holds an empty text, at which everything would end")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie above 0 and at most at 1")
        if not self.ids:
            raise DataError("the prompt is empty, and the tokenizer has no token to begin with")


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for one at which no tokens can be drawn."""
    if not (temperature == 0 or COLDEST <= temperature <= 2):
        raise ConfigError(f"temperature={temperature:g} must be 0 or lie between {COLDEST:g} and 2")


def context_length(prepared: Prepared) -> int | None:
    """How many tokens of prompt and answer the model takes; None where there is no end to it."""
    told = getattr(prepared.model.config, "max_position_embeddings", None)
    known = [int(n) for n in (prepared.base.positions, told) if n]
    return min(known, default=None)


def check_answers(prepared: Prepared) -> None:
    """Raise ConfigError where the model writes no answers."""
    if prepared.layout is not None:
        raise ConfigError(f"{prepared.recipe.model} is an encoder, which writes no answers: moesaic eval scores it")


def of_prompt(prepared: Prepared, prompt: str) -> Example:
    """A prompt as the run's rows were given: in the tokenizer's chat template, or as it is."""
    (example,) = prepared.given([Example("", prompt)])
    return example


def of_messages(messages: Sequence[tuple[str, str]]) -> Example:
    """A chat of (role, content), which the assistant goes on with.

    Raises:
        DataError: no messages, an unknown role, or nothing to answer.
    """
    if not messages:
        raise DataError("messages is empty: a chat has a message at least")
    for role, _ in messages:
        if role not in ROLES:
            raise DataError(f"a message's role is {role!r}: known are {', '.join(ROLES)}")
    if messages[-1][0] == "assistant":
        raise DataError("the last message is the assistant's: there is nothing to answer")
    return Example("", "", messages=(*messages, ("assistant", "")), where="messages")


def read_messages(text: str) -> Example:
    """A chat out of JSON: [{"role": "user", "content": "…"}, …], or {"messages": […]}.

    Raises:
        DataError: it is neither.
    """
    try:
        found: Any = json.loads(text)
        rows = found["messages"] if isinstance(found, dict) else found
        messages = [(row["role"], row["content"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError):
        messages = None
    if messages is None or not all(isinstance(part, str) for message in messages for part in message):
        raise DataError('messages is no JSON like [{"role": "user", "content": "…"}]')
    return of_messages(messages)


def asked(
    prepared: Prepared,
    what: Example | Sequence[int],
    *,
    max_tokens: int | None = None,
    room: int | None = None,
    **how: Any,
) -> Asked:
    """A question.

    Args:
        what: a row, whose prompt it is, or tokens.
        max_tokens: None for all that there is room for, 512 at most.
        room: of prompt and answer, where whoever answers sets an end before the model does.

    Raises:
        ConfigError, DataError: a setting out of its range, no chat template, or a prompt that leaves no room.
    """
    example = what if isinstance(what, Example) else Example("", "")
    try:
        "".join([example.prompt, *(text for _, text in example.messages)]).encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is no text in UTF-8") from None
    ids = prompt_ids(what, prepared.base.tokenizer) if isinstance(what, Example) else list(what)
    embedded = prepared.base.model.get_input_embeddings().num_embeddings
    if not all(0 <= i < embedded for i in ids):
        raise DataError(f"the prompt holds tokens that the model does not know: it embeds {embedded}")
    _check_task(prepared, str(how.get("task", "")))
    length = context_length(prepared)
    if length is not None and length - len(ids) < (max_tokens or 1):
        raise ConfigError(
            f"the prompt has {len(ids)} tokens and max_tokens={max_tokens or 1} are to come, and the model takes "
            f"{length} of both"
        )
    if max_tokens is None:
        max_tokens = max(1, min(512, *(end - len(ids) for end in (length, room) if end is not None), 512))
    return Asked(tuple(ids), max_tokens, ends=frozenset(ends(prepared, [example])), **how)


def _check_task(prepared: Prepared, task: str) -> None:
    """Raise ConfigError where a method is told a task that it does not ask for, or none that it does."""
    needs = prepared.routed and prepared.model.peft_config["default"].kind.needs_tasks
    if task and not needs:
        raise ConfigError(f"task={task}: method {prepared.recipe.method} is told none")
    check_known(prepared, [task] if task else [])
