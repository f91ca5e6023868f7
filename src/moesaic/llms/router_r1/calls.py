"""The function-call dialect, as Hermes and Qwen models write it: models of the catalog are functions of one argument.

    ( <think> … </think>  <tool_call> {"name": NAME, "arguments": {"query": QUERY}} </tool_call>
      <tool_response> REPLY </tool_response> )*
    <think> … </think>  ANSWER

Thinking may be left out, or begin in the prompt. A generation ends with its first call; one without a call is the end,
and what it says after thinking is the answer. A call that cannot be read is replied to as one of nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.prompt import FIELDS, described, weighed
from moesaic.llms.router_r1.transcript import Dialect, Search, Transcript

LONGEST = 64
"""Characters of a function's name, as OpenAI has it."""
QUERY = "A question that can be answered by itself, in your own words."
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CALLS = re.compile(r"(?:<tool_call>(?:(?!</?tool_call>).)*</tool_call>\s*)+\Z", re.DOTALL)
_TAG = re.compile(r"</?tool_call>")
_MARK = re.compile(r"<(?=/?(?:think|tool_call|tool_response)>|\|)")
_TASK = """Answer the question at the end. You may ask other language models by calling them as functions, and you see
what they reply. Whenever you have learned something, think about it first, between <think> and </think>.
Where you lack knowledge, choose the model that suits best, and ask it. You may ask several models, one call at a time,
and one more than once. Never repeat what is said of the models.
When you know enough, write the answer alone, in few words and without a call.
"""
_TOOLS = """
The functions, each between <tools> and </tools>:
<tools>
{tools}
</tools>
A call is a JSON object, after which you stop; its reply comes between <tool_response> and </tool_response>:
<tool_call>
{{"name": FUNCTION, "arguments": {{"query": QUERY}}}}
</tool_call>
"""


def function_name(name: str) -> str:
    """A model's name as that of a function: ASCII letters, digits and `_`, a letter first."""
    made = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    return (made if made[:1].isalpha() else f"model_{made}".rstrip("_"))[:LONGEST]


def functions(models: Iterable[Model]) -> dict[str, Model]:
    """Models by their functions' names. Raises ConfigError for two that would have the same."""
    found: dict[str, Model] = {}
    for model in models:
        other = found.setdefault(name := function_name(model.name), model)
        if other.name != model.name:
            raise ConfigError(f"{other.name} and {model.name} would both be the function {name}: rename one")
    return found


def tools(models: Iterable[Model], tell: Iterable[str] = FIELDS) -> list[dict[str, Any]]:
    """The functions as endpoints and chat templates take them."""
    tell, query = list(tell), {"type": "string", "description": QUERY}
    parameters = {"type": "object", "properties": {"query": query}, "required": ["query"]}
    return [
        {
            "type": "function",
            "function": {"name": name, "description": f"Ask {described(model, tell)}", "parameters": parameters},
        }
        for name, model in functions(models).items()
    ]


def written(message: Mapping[str, Any], dialect: Dialect) -> str:
    """A message of an assistant, whose thinking and calls are apart, as one text."""
    thought = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking") or ""
    parts = [f"<think>\n{dialect.harmless(thought)}\n</think>\n"] if thought else []
    parts.append(message.get("content") or "")
    for call in message.get("tool_calls") or ():
        function = call["function"]
        given = function.get("arguments")
        if isinstance(given, str):
            with suppress(ValueError, RecursionError):  # what cannot be read stays a text, as no call's arguments are
                given = json.loads(given)
        body = json.dumps({"name": function.get("name"), "arguments": given}, ensure_ascii=False)
        parts.append("\n<tool_call>\n" + _MARK.sub(r"\\u003c", body) + "\n</tool_call>")
    return "".join(parts).lstrip("\n")


class Calls(Dialect):
    """Calls and replies as chats have them."""

    stops = ("</tool_call>",)
    around = ("\n<tool_response>\n", "\n</tool_response>\n")
    turns = True

    def __init__(self, *, listed: bool = True) -> None:
        """
        Args:
            listed: the prompt tells the functions; False where they are given beside it (`HttpPolicy`, TRL).
        """
        self.listed = listed

    def prompt(
        self, question: str, models: Iterable[Model], tell: Iterable[str] = FIELDS, *, alpha: float | None = None
    ) -> str:
        """Raises ConfigError for models whose functions would have the same name."""
        told = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools(models, tell))
        listed, cost = _TOOLS.format(tools=told) if self.listed else "", weighed(alpha)
        return f"{_TASK}{cost}{listed}\nQuestion: {question.strip()}\n"

    def call(self, thought: str, model: Model, query: str) -> str:
        function = {"name": function_name(model.name), "arguments": {"query": query}}
        return written({"thinking": thought, "tool_calls": [{"function": function}]}, self)

    def end(self, thought: str, answer: str) -> str:
        return written({"thinking": thought, "content": answer}, self)

    def action(self, text: str) -> Search | str:
        """A call; else the end, which is an answer where nothing is left open."""
        found = _CALL.search(text)
        if found is not None:
            return _read(found[1])[0]
        return "" if "<tool_call>" in text else _spoken(text)

    def resolve(self, name: str, catalog: Catalog) -> Model | None:
        """The model of an exact function's name."""
        return functions(catalog.values()).get(name)

    def harmless(self, text: str) -> str:
        """Tags and control tokens have their `<` written out."""
        return _MARK.sub("&lt;", text)

    def answer(self, transcript: Transcript) -> str:
        done = self.action(transcript.generations[-1]) if transcript.generations else ""
        return done if isinstance(done, str) else ""

    def fault(self, transcript: Transcript, catalog: Catalog, *, strict: bool = False) -> str:
        """Of each generation in its turn. `strict` wants thinking, one call at a time, and no text beside it."""
        own = transcript.generations
        for at, text in enumerate(own):
            if why := _fault(text, functions(catalog.values()), last=at == len(own) - 1, strict=strict):
                return why
        return "" if own else "nothing is written"


def _spoken(text: str) -> str:
    """A generation without its thinking; empty where that never ends."""
    _, end, after = text.partition("</think>")
    return after.strip() if end else "" if "<think>" in text else text.strip()


def _read(body: str) -> tuple[Search, str]:
    """What a call asks for, and what is wrong with it: then there is no query."""
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        return Search("", ""), "a call that is no JSON"
    name = said.get("name") if isinstance(said, dict) else None
    if not isinstance(name, str) or said.keys() != {"name", "arguments"}:
        return Search(name if isinstance(name, str) else "", ""), "a call needs name and arguments, and nothing else"
    given = said["arguments"]
    query = given.get("query") if isinstance(given, dict) and len(given) == 1 else None
    if not isinstance(query, str) or not query.strip():
        return Search(name, ""), "a call needs one argument, the query"
    return Search(name, query.strip()), ""


def _fault(text: str, known: Mapping[str, Model], *, last: bool, strict: bool) -> str:
    """What breaks one generation, of which the last must be the answer, and no other may."""
    if "<tool_response>" in text or "</tool_response>" in text:
        return "the policy wrote a reply of its own"
    thought, end, rest = text.strip().partition("</think>")
    if not end:
        thought, rest = "", thought
    thought = thought.removeprefix("<think>")
    if "<think>" in thought + rest or "</think>" in rest:
        return "<think> and </think> do not stand once, at the beginning"
    if _TAG.search(thought):
        return "a call within <think>"
    if strict and not thought.strip():
        return "no <think>"
    calls = _CALLS.search(rest)
    if _TAG.search(rest[: calls.start()] if calls else rest):
        return "<tool_call> and </tool_call> do not pair, or text follows"
    if calls is None:
        return "an answer before the end" if not last else "" if rest.strip() else "no answer"
    bodies = _CALL.findall(calls[0])
    for body in bodies:
        search, why = _read(body)
        if why or search.name not in known:
            return why or f"no model {search.name[:40]!r}"
    if strict and (len(bodies) > 1 or rest[: calls.start()].strip()):
        return "text beside a call, or another call"
    return "no answer" if last else ""
