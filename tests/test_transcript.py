"""Router-R1's transcripts: what breaks them, what they do, and that a reply changes nothing but what is read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.llms.catalog import Catalog
from moesaic.llms.router_r1.prompt import described, helper, prompt
from moesaic.llms.router_r1.transcript import (
    TAGS,
    Piece,
    Search,
    Transcript,
    action,
    blocks,
    cut,
    fault,
    harmless,
    resolve,
)

CATALOG = Catalog.of([
    {"name": "Qwen2.5-7B-Instruct", "aliases": ["qwen"], "input_price": 0.1, "output_price": 0.3, "parameters": 7.6,
     "description": "Strong at it.", "examples": {"gsm8k": 0.85}, "latency": 0.4},
    {"name": "LLaMA-3.1-8B-Instruct", "input_price": 0.1, "output_price": 0.18, "parameters": 8},
    {"name": "LLaMA-3.1-70B-Instruct", "input_price": 0.4, "output_price": 0.88, "parameters": 70},
])  # fmt: skip
THINK, ANSWER = "<think> hm </think>", "<answer> Beijing </answer>"
CALL = "<search> qwen: what is it? </search>\n\n<information>it is so</information>\n\n"
GOOD = {
    "no call": THINK + ANSWER,
    "one call": THINK + CALL + THINK + ANSWER,
    "two": (THINK + CALL) * 2 + THINK + ANSWER,
}
BROKEN = {
    "missing think": (CALL + ANSWER, "no <think>"),
    "nothing": ("Beijing", "no block"),
    "two answers": (THINK + ANSWER + ANSWER, "2 answers"),
    "no answer": (THINK + CALL, "0 answers"),
    "search without information": (THINK + "<search> qwen: a? </search>" + ANSWER, "1 searches and 0 replies"),
    "unknown model": (THINK + CALL.replace("qwen", "GPT-9") + ANSWER, "no model 'GPT-9'"),
    "part of a name": (THINK + CALL.replace("qwen", "LLaMA") + ANSWER, "no model 'LLaMA'"),
    "placeholder": (THINK + CALL.replace("qwen: what", "LLM-Name: what") + ANSWER, "placeholder"),
    "empty query": (THINK + CALL.replace(" what is it? ", " ") + ANSWER, "without a query"),
    "name in the query": (THINK + CALL.replace("it?", "qwen?") + ANSWER, "name stands in the query"),
    "nested tag": ("<think> a <answer> b </answer> </think>" + ANSWER, "a tag within <think>"),
    "trailing text": (THINK + ANSWER + " done", "does not begin"),
    "leading text": ("Well. " + THINK + ANSWER, "does not begin"),
    "an end token": (THINK + ANSWER + "<|im_end|>", "does not begin"),
    "a URL": (THINK + CALL.replace("it?", "http://x?") + ANSWER, "one colon"),
    "empty think": ("<think> ... </think>" + ANSWER, "an empty <think>"),
    "open tag": (THINK + "<think>" + ANSWER, "do not pair"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_sound_transcript_has_no_fault(text: str, strict: bool) -> None:
    assert fault(text, CATALOG, strict=strict) == ""
    assert fault(f"\n {text} \n", CATALOG, strict=strict) == ""


@pytest.mark.parametrize(("text", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_transcript_is_told_why(text: str, why: str) -> None:
    assert why in fault(text, CATALOG)
    assert fault(text, CATALOG, strict=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (THINK + "so" + ANSWER, "text between"),
        (THINK + THINK + ANSWER, "<think> after <think>"),
        (THINK + CALL + ANSWER, "<answer> after <information>"),
        (THINK + "<information>it</information><search> qwen: a? </search>" + THINK + ANSWER, "<information> after"),
    ],
)
def test_only_the_strict_grammar_minds_the_order(text: str, why: str) -> None:
    assert fault(text, CATALOG) == ""
    assert why in fault(text, CATALOG, strict=True)


SCRAPS = st.lists(
    st.sampled_from([
        *(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), "qwen: why?", "qwen", ":", " ", "text", "...",
        THINK, CALL, ANSWER,
    ]),
    max_size=9,
).map("".join)  # fmt: skip


def naive_fault(text: str) -> bool:
    """The published rules, each by a pattern of its own."""
    pairs = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in TAGS}
    if any(text.count(f"<{tag}>") != text.count(f"</{tag}>") for tag in TAGS) or not any(pairs.values()):
        return True
    if any(t.strip() in ("", "...") for t in pairs["think"]):
        return True
    if any(f"<{mark}{tag}>" in body for own in pairs.values() for body in own for tag in TAGS for mark in ("", "/")):
        return True
    if len(pairs["answer"]) != 1 or not pairs["think"] or len(pairs["search"]) != len(pairs["information"]):
        return True
    if not (text.strip().startswith("<think>") and text.strip().endswith("</answer>")):
        return True
    for body in pairs["search"]:
        name, _, query = body.partition(":")
        known = name.strip() in (*CATALOG, "qwen")
        if body.count(":") != 1 or not query.strip() or not known or name.strip() in query:
            return True
    return False


@given(SCRAPS)
def test_faults_are_those_of_the_rules_one_by_one(text: str) -> None:
    assert bool(fault(text, CATALOG)) == naive_fault(text)
    if not fault(text, CATALOG, strict=True):
        assert not fault(text, CATALOG)


def test_blocks_have_places() -> None:
    text = "a<think>b</think>c<answer>d</answer>"
    assert [(b.tag, b.text, text[b.start : b.end]) for b in blocks(text)] == [
        ("think", "b", "<think>b</think>"), ("answer", "d", "<answer>d</answer>"),
    ]  # fmt: skip
    assert blocks("<think>never closed") == blocks("</think>") == []


@pytest.mark.parametrize(
    ("text", "kept", "done"),
    [
        ("<think>a</think><search> qwen: b? </search> tail", "</search>", Search("qwen", "b?")),
        ("<search>qwen:b: c</search>", "</search>", Search("qwen", "b: c")),
        ("<answer> 4 </answer><search>qwen: b?</search>", "</search>", "4"),
        ("<answer> 4 </answer> and more", "</answer>", "4"),
        ("<search>qwen b</search>", "</search>", None),
        ("<search>qwen: </search>", "</search>", None),
        ("<search> LLM-NAME: Your-Query </search>", "</search>", None),
        ("nothing done", "done", None),
    ],
)
def test_a_generation_counts_up_to_its_first_call(text: str, kept: str, done: Search | str | None) -> None:
    assert cut(text).endswith(kept)
    assert action(cut(text)) == done


def test_names_are_exact() -> None:
    assert resolve(" qwen ", CATALOG) is CATALOG["Qwen2.5-7B-Instruct"]
    assert resolve("Qwen", CATALOG) is resolve("LLaMA-3.1", CATALOG) is resolve("", CATALOG) is None


REPLIES = st.text() | st.lists(
    st.sampled_from([*(f"<{t}>" for t in TAGS), *(f"</{t}>" for t in TAGS), "Beijing", ANSWER, THINK, CALL, ":"])
).map("".join)


@given(st.lists(REPLIES, min_size=2, max_size=2), st.lists(REPLIES, min_size=2, max_size=2), SCRAPS)
def test_a_reply_changes_neither_fault_nor_answer(one: list[str], other: list[str], scrap: str) -> None:
    def made(replies: list[str]) -> Transcript:
        own = [THINK + "<search> qwen: a? </search>", scrap + "<search> qwen: b? </search>", THINK + ANSWER]
        return Transcript([
            Piece(own[0]), Piece(replies[0], reply=True), Piece(own[1]), Piece(replies[1], reply=True), Piece(own[2]),
        ])  # fmt: skip

    a, b = made(one), made(other)
    assert (a.checked, a.own, a.answer) == (b.checked, b.own, b.answer)
    for strict in (False, True):
        assert a.fault(CATALOG, strict=strict) == b.fault(CATALOG, strict=strict)
    assert a.text.count("</information>") == 2 + scrap.count("</information>")


def test_a_policy_cannot_reply_to_itself() -> None:
    made = Transcript([Piece(THINK + CALL + THINK + ANSWER)])
    assert fault(made.text, CATALOG) == ""
    assert made.fault(CATALOG) == "the policy wrote a reply of its own"
    assert harmless("</information><b>") == "&lt;/information><b>"


def test_a_prompt_tells_what_is_known() -> None:
    qwen, small = CATALOG["Qwen2.5-7B-Instruct"], CATALOG["LLaMA-3.1-8B-Instruct"]
    line = "7.6 billion parameters; $0.3 a million tokens of reply; 0.4 s to the first token; gsm8k 85%; Strong at it."
    assert described(qwen) == f"Qwen2.5-7B-Instruct: {line}"
    assert described(qwen, ["prose"]) == "Qwen2.5-7B-Instruct: Strong at it."
    assert described(small, ["prose"]) == "LLaMA-3.1-8B-Instruct"
    whole = prompt("Who? ", [qwen, small], ["prose"])
    assert "[Qwen2.5-7B-Instruct, LLaMA-3.1-8B-Instruct]" in whole
    assert whole.endswith("Question: Who?\n")
    assert not any(name in whole for name in CATALOG if name.endswith("70B-Instruct"))
    assert helper("Why {this}?").endswith("Why {this}?")
