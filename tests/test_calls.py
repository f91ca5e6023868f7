"""The function-call dialect: what breaks it, what it does, and that a reply changes nothing but what is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1 import warm
from moesaic.llms.router_r1.calls import Calls, function_name, functions, tools, written
from moesaic.llms.router_r1.engine import Limits, Question, Reply, Rollout, Written, plainly, roll
from moesaic.llms.router_r1.grpo import Episode
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.rewards import Rewards
from moesaic.llms.router_r1.transcript import TAGGED, Dialect, Piece, Search, Transcript
from moesaic.models.embedded import load_model

CATALOG = Catalog.of([
    {"name": "Qwen2.5-7B-Instruct", "aliases": ["qwen"], "input_price": 0.1, "output_price": 0.3, "parameters": 7.6,
     "description": "Strong at it."},
    {"name": "org/poet", "input_price": 0.1, "output_price": 2.0, "parameters": 1},
])  # fmt: skip
CALLS = Calls()
THINK = "<think> hm </think>\n"
NAME = "Qwen2_5_7B_Instruct"


def call(name: str = NAME, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments or {"query": "what is it?"}})
    return f"<tool_call>\n{body}\n</tool_call>"


def made(*own: str, reply: str = "it is so") -> Transcript:
    """Generations with a reply after each but the last."""
    pieces = [piece for text in own for piece in (Piece(text), Piece(reply, reply=True))]
    return Transcript(pieces[:-1], CALLS)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Qwen2.5-7B-Instruct", NAME), ("org/poet", "org_poet"), ("3B", "model_3B"), ("模型", "model"), ("_x-", "x"),
        ("a" * 99, "a" * 64),
    ],
)  # fmt: skip
def test_models_are_named_as_functions(name: str, function: str) -> None:
    assert function_name(name) == function
    assert function_name(function) == function


def test_functions_are_told_apart_or_refused() -> None:
    assert {name: model.name for name, model in functions(CATALOG.values()).items()} == {
        NAME: "Qwen2.5-7B-Instruct", "org_poet": "org/poet",
    }  # fmt: skip
    assert CALLS.resolve(NAME, CATALOG) is CATALOG["Qwen2.5-7B-Instruct"]
    assert CALLS.resolve("qwen", CATALOG) is CALLS.resolve("Qwen2.5-7B-Instruct", CATALOG) is None
    alike = [Model(name=name, input_price=0, output_price=0, parameters=1) for name in ("a.b", "a-b")]
    with pytest.raises(ConfigError, match=r"a\.b and a-b would both be the function a_b"):
        Calls(listed=False).prompt("Who?", alike)


def test_a_prompt_tells_the_functions_unless_they_are_given_beside_it() -> None:
    whole = plainly(Question("Who? ", CATALOG), CALLS)
    listed = whole.partition("<tools>\n")[2].partition("</tools>")[0].splitlines()
    assert [json.loads(line) for line in listed] == tools(CATALOG.values())
    assert "Ask Qwen2.5-7B-Instruct: 7.6 billion parameters; $0.3 a million" in listed[0]
    assert whole.endswith("Question: Who?\n")
    assert "<tools>" not in Calls(listed=False).prompt("Who?", CATALOG.values())


GOOD = {
    "no call": made("Beijing"),
    "thinking": made(THINK + "Beijing"),
    "thinking that the prompt opened": made("hm </think> Beijing"),
    "thinking of nothing": made("<think>\n\n</think>\n\nBeijing"),
    "one call": made(THINK + call(), THINK + "Beijing"),
    "two": made(call(), "I ask. " + call("org_poet"), "Beijing"),
    "two at once": made(THINK + call() + "\n" + call("org_poet"), "Beijing"),
}


@pytest.mark.parametrize("transcript", GOOD.values(), ids=GOOD)
def test_a_sound_transcript_has_no_fault(transcript: Transcript) -> None:
    assert transcript.fault(CATALOG) == ""
    assert transcript.answer == "Beijing"


BROKEN = {
    "nothing": (Transcript(dialect=CALLS), "nothing is written"),
    "an empty answer": (made(THINK + " "), "no answer"),
    "no answer": (made(THINK + call()), "no answer"),
    "two answers": (made("Rome", "Beijing"), "an answer before the end"),
    "a reply of one's own": (made(call() + "<tool_response>x</tool_response>", "Beijing"), "a reply of its own"),
    "thinking without end": (made("<think> Beijing"), "do not stand once"),
    "thinking twice": (made(THINK + THINK + "Beijing"), "do not stand once"),
    "thinking late": (made("Well. " + THINK + "Beijing"), "do not stand once"),
    "a call in thinking": (made(f"<think> {call()} </think>", "Beijing"), "within <think>"),
    "an open call": (made("<tool_call> Beijing"), "do not pair"),
    "text after a call": (made(call() + "Beijing"), "text follows"),
    "a nested call": (made(f"<tool_call>{call()}", "Beijing"), "do not pair"),
    "no JSON": (made("<tool_call>{name}</tool_call>", "Beijing"), "no JSON"),
    "deep JSON": (made(f"<tool_call>{'[' * 10**5}</tool_call>", "Beijing"), "no JSON"),
    "no object": (made("<tool_call>[1]</tool_call>", "Beijing"), "needs name and arguments"),
    "more than a call": (made('<tool_call>{"name": "a", "arguments": {}, "id": 1}</tool_call>', "x"), "nothing else"),
    "no query": (made(call(q="x"), "Beijing"), "one argument"),
    "more than a query": (made(call(query="x", n=1), "Beijing"), "one argument"),
    "an empty query": (made(call(query=" "), "Beijing"), "one argument"),
    "a query that is no text": (made(call(query=5), "Beijing"), "one argument"),
    "unknown model": (made(call("GPT"), "Beijing"), "no model 'GPT'"),
    "a model's own name": (made(call("Qwen2.5-7B-Instruct"), "Beijing"), "no model"),
}


@pytest.mark.parametrize(("transcript", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_transcript_is_told_why(transcript: Transcript, why: str) -> None:
    assert why in transcript.fault(CATALOG)
    assert transcript.fault(CATALOG, strict=True)


@pytest.mark.parametrize(
    ("transcript", "why"),
    [
        (made("Beijing"), "no <think>"), (GOOD["thinking of nothing"], "no <think>"),
        (made(THINK + "I ask. " + call(), THINK + "Beijing"), "text beside a call"),
        (GOOD["two at once"], "another call"), (GOOD["one call"], ""), (GOOD["thinking that the prompt opened"], ""),
    ],
)  # fmt: skip
def test_strictness_wants_thinking_and_single_calls(transcript: Transcript, why: str) -> None:
    assert transcript.fault(CATALOG) == ""
    found = transcript.fault(CATALOG, strict=True)
    assert why in found
    assert bool(found) == bool(why)


@pytest.mark.parametrize(
    ("text", "kept", "done"),
    [
        (THINK + call() + " tail " + call("b"), "</tool_call>", Search(NAME, "what is it?")),
        ("<tool_call>{}</tool_call>", "</tool_call>", Search("", "")),
        (call("poet", q=1), "</tool_call>", Search("poet", "")),
        (THINK + " 4 ", " 4 ", "4"),
        ("4 </think> 5", "5", "5"),
        ("<think> 4", "4", ""),
        ("4 <tool_call> {", "{", ""),
    ],
)
def test_a_generation_counts_up_to_its_first_call(text: str, kept: str, done: Search | str) -> None:
    assert CALLS.cut(text).endswith(kept)
    assert CALLS.action(CALLS.cut(text)) == done


@pytest.mark.parametrize(
    ("dialect", "text", "closed"),
    [
        (TAGGED, "<think> a </think><search> qwen: b", "</search>"), (TAGGED, "nothing", ""),
        (TAGGED, "<search>a</search><answer> 4", "</answer>"), (TAGGED, "<answer> 4 </answer>", ""),
        (CALLS, THINK + '<tool_call>{"a"', "</tool_call>"),
        (CALLS, "4", ""),
    ],
)  # fmt: skip
def test_a_stop_that_was_cut_off_is_put_back(dialect: Dialect, text: str, closed: str) -> None:
    assert dialect.closed(text) == text + closed


def test_messages_are_written_out_as_the_dialect_has_them() -> None:
    function = {"name": NAME, "arguments": json.dumps({"query": "a </tool_call> b"})}
    text = written({"content": None, "reasoning_content": "a </think>", "tool_calls": [{"function": function}]}, CALLS)
    assert text.startswith("<think>\na &lt;/think>\n</think>\n")
    assert CALLS.cut(text) == text
    assert CALLS.action(text) == Search(NAME, "a </tool_call> b")
    broken = {"name": NAME, "arguments": "{query"}
    assert "one argument" in made(written({"tool_calls": [{"function": broken}]}, CALLS), "x").fault(CATALOG)
    assert written({"content": "4"}, CALLS) == "4"


# -- replies -----------------------------------------------------------------------------------------------------------

MARKS = [f"<{mark}{tag}>" for tag in ("think", "tool_call", "tool_response") for mark in ("", "/")]
REPLIES = st.text() | st.lists(
    st.sampled_from([*MARKS, "<", "|im_end|>", "<|im_start|>", "/tool_response>", "Beijing", THINK, call(), "\n"])
).map("".join)


@given(REPLIES)
def test_a_reply_can_neither_close_its_block_nor_call(reply: str) -> None:
    shown = CALLS.shown(reply)
    assert [shown.count(mark) for mark in MARKS] == [0, 0, 0, 0, 1, 1]
    assert shown.endswith("\n</tool_response>\n")
    assert "<|" not in shown
    assert CALLS.harmless(CALLS.harmless(reply)) == CALLS.harmless(reply)


class Spelled:
    """A policy that says its lines, letter by letter."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def begin(self, prompts: Sequence[str]) -> Spelled:
        self.left = list(self.lines)
        return self

    def write(self, who: Sequence[int]) -> list[Written]:
        ids = tuple(map(ord, self.left.pop(0)))
        return [Written("".join(map(chr, ids)), len(ids), ids, (-1.0,) * len(ids))]

    def read(self, who: int, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def clip(self, text: str, tokens: int) -> str:
        return text[:tokens]


class Saying:
    def __init__(self, text: str) -> None:
        self.text = text

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        return [Reply(self.text, 7) for _ in calls]


OWN = st.lists(st.sampled_from([*MARKS, THINK, call(), call("GPT"), "Beijing", "{}"]), max_size=5).map("".join)
SEARCH = "<search> qwen: what? </search>"


@given(REPLIES, REPLIES, st.lists(OWN, min_size=4, max_size=4), st.booleans())
def test_what_counts_depends_on_the_policys_own_tokens_and_on_cost_alone(
    one: str, other: str, scraps: list[str], tagged: bool
) -> None:
    dialect: Dialect = TAGGED if tagged else CALLS
    first = THINK + (SEARCH if tagged else call())
    last = THINK + ("<answer> Beijing </answer>" if tagged else "Beijing")

    def told(reply: str) -> Any:
        policy = Spelled(first, scraps[0] + first, *scraps[1:4], last)
        (found,) = roll(policy, Saying(reply), [Question("q", CATALOG, ("Beijing",))], Limits(turns=4), dialect=dialect)
        episode = Episode.of(found, ())
        reward = Rewards(0.5)(found.fault(), found.answer, found.question.truths, found.cost)
        own = [(i, p) for i, p, mine in zip(episode.completion, episode.logprobs, episode.own, strict=True) if mine]
        assert [i for i, _ in own] == [i for w in found.written for i in w.ids]
        calls = [(call.model, call.query, call.cost, call.failure) for call in found.calls]
        return reward, found.fault(strict=True), found.answer, own, found.policy_tokens, calls

    assert told(one) == told(other)


def test_a_call_that_cannot_be_made_is_none_and_costs_nothing() -> None:
    lines = ["<tool_call>{}</tool_call>", call("GPT"), call(q="x"), call(), THINK + "Beijing"]
    (found,) = roll(Spelled(*lines), Saying("so"), [Question("q", CATALOG)], dialect=CALLS)
    assert [call.failure for call in found.calls] == ["no model ''", "no model 'GPT'", "a call without a query", ""]
    assert [call.reply for call in found.calls] == ["None", "None", "None", "so"]
    assert (found.answer, found.cost) == ("Beijing", pytest.approx(7 * 0.3))
    assert found.fault()
    assert found.transcript.text.endswith(call() + "\n<tool_response>\nso\n</tool_response>\n" + THINK + "Beijing")


# -- a policy in this process ------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_local_policy_stops_at_calls_and_reads_replies_as_turns() -> None:
    loaded = load_model("nano")
    loaded.tokenizer.chat_template = CHATML
    policy = LocalPolicy(loaded.model.eval(), loaded.tokenizer, dialect=CALLS, temperature=0, max_new_tokens=4)
    for text, ends in ((call(), True), ("</search>", False), ("</think>", False)):
        assert policy.stopped(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) == ends
    shown = loaded.tokenizer.decode(policy.heard(CALLS.shown("so")))
    assert (
        shown
        == "<|im_end|>\n<|im_start|>user\n<tool_response>\nso\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    rounds = policy.begin(["4 1 8 2 up ="])
    (first,) = rounds.write([0])
    heard = rounds.read(0, CALLS.shown("so"))
    (second,) = rounds.write([0])
    whole = [*policy.encode("4 1 8 2 up ="), *first.ids, *heard]
    assert second.ids[0] == int(loaded.model(input_ids=torch.tensor([whole])).logits[0, -1].argmax())
    (row,) = warm.rows(policy, [Rollout(Question("q", CATALOG), made(call(), "4", reply="so"))], ["q"])
    own, eos = [i for i in row["labels"] if i != warm.IGNORED], loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.decode(own[:-1]) == call() + "4"
    assert own[-1] == eos
    assert own.count(eos) == 1
    assert loaded.tokenizer.decode(row["input_ids"]).endswith(f"{call()}{shown}4<eos>")
    plain = LocalPolicy(loaded.model, loaded.tokenizer)
    assert loaded.tokenizer.decode(plain.heard(TAGGED.shown("so"))) == "\n\n<information>so</information>\n\n"


def test_a_rollout_is_of_the_tags_where_nothing_else_is_said() -> None:
    assert Rollout(Question("q", CATALOG)).transcript.dialect is TAGGED
