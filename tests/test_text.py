"""Text by domain: where it comes from, what is held out, how it becomes rows of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic import nano
from moesaic.data.text import documents, parted, rows
from moesaic.errors import MoesaicError
from moesaic.training.domains import domains_of, figures, mixed, named


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = 0

    def __call__(self, text: str, **how: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def batch_decode(self, ids: torch.Tensor, **how: Any) -> list[str]:
        return ["".join(map(chr, row)) for row in ids.tolist()]


def test_sources_are_files_folders_patterns_rows_and_what_python_brings_along(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.py").write_text("second")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    assert documents(str(tmp_path / "a.txt")) == ["first"]
    assert documents(str(tmp_path)) == ["first", "second"]
    assert documents(str(tmp_path / "**" / "*.py")) == ["second"]
    task = tmp_path / "task"
    task.mkdir()
    lines = [
        {"task": "t", "prompt": "2 + 2 =", "completion": "4"},
        {"task": "t", "prompt": "which?", "choices": ["this", "that"], "answer": 1},
        {"task": "t", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ]
    (task / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert documents(str(task)) == documents(str(task / "train.jsonl")) == ["2 + 2 = 4", "which? that", "hi ho"]
    (task / "test.jsonl").write_text(json.dumps({"prompt": "held", "completion": "out"}))
    assert documents(str(task)) == documents(str(tmp_path / "*" / "train.jsonl"))
    assert documents(str(tmp_path / "*" / "test.jsonl")) == ["held out"], "the folder names the task"
    (task / "train.jsonl").write_text(json.dumps({"text": "a page", "url": "…"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}))
    assert documents(str(task)) == ["a page"]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "notes.jsonl").write_text(json.dumps({"text": "noted"}))
    (mixed / "a.txt").write_text("plain")
    assert documents(str(mixed)) == ["plain", "noted"]
    assert any("def " in text for text in documents("stdlib"))
    assert any("statement" in text for text in documents("pydoc"))


def test_what_links_lead_to_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    for name in "abc":
        (tmp_path / "lib" / f"{name}.txt").write_text(f"text {name}")
    (tmp_path / "lib64").symlink_to("lib")
    (tmp_path / "lib" / "up").symlink_to("..")
    (tmp_path / "lib" / "up2").symlink_to("..")
    (tmp_path / "again.txt").symlink_to("lib/a.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    assert sorted(documents(str(tmp_path))) == ["text a", "text b", "text c"]
    assert sorted(documents(f"{tmp_path}/lib*/*.txt")) == ["text a", "text b", "text c"]


@given(st.lists(st.text("ab\n", min_size=1, max_size=9), min_size=1, max_size=40))
def test_nothing_is_lost_between_what_is_learned_and_what_is_held_out(texts: list[str]) -> None:
    learned, held = parted(texts)
    if len(texts) >= 10:
        assert sorted([*learned, *held]) == sorted(texts)
        assert len(held) == len(texts) // 10
    else:
        assert "".join(sorted("".join([*learned, *held]))) == "".join(sorted("\n".join(texts)))


def test_rows_run_on_over_documents_and_stop_at_the_limit() -> None:
    read: list[str] = []

    def texts() -> Any:
        for text in ("abc", "defg", "h"):
            read.append(text)
            yield text

    made = rows(Letters(), texts(), 4)
    assert ["".join(map(chr, row)) for row in made.tolist()] == ["abc\0", "defg"]
    read.clear()
    assert rows(Letters(), texts(), 4, limit=1).shape == (1, 4)
    assert read == ["abc"]
    assert rows(Letters(), [], 4).shape == (0, 4)


def test_names_are_those_given_or_the_last_part_of_the_source() -> None:
    assert named(["stdlib", "data/gsm8k", "notes.txt"]) == {
        "stdlib": "stdlib", "gsm8k": "data/gsm8k", "notes": "notes.txt"
    }  # fmt: skip
    assert named({"code": "src"}) == {"code": "src"}
    assert named("lists") == {"lists": "lists"}
    assert named(None) == {}


def test_generated_domains_are_the_same_for_a_seed_and_held_out_ones_for_all() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    how = {"length": 16, "train": 4, "held": 3}
    first, again, other = (domains_of(named(["lists"]), tokenizer, seed=seed, **how)["lists"] for seed in (0, 0, 1))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)
    assert torch.equal(first.held, other.held)
    written = "".join(tokenizer.batch_decode(first.held, clean_up_tokenization_spaces=False)).replace("<eos>", "")
    assert first.bytes_per_token == len(written.encode()) / first.held.numel()
    batches = mixed({"a": first, "b": other}, 2, seed=0)
    drawn = torch.cat([next(batches)["input_ids"] for _ in range(4)])
    assert {tuple(row) for row in drawn.tolist()} == {
        tuple(row) for row in [*first.train.tolist(), *other.train.tolist()]
    }


def test_figures_are_those_of_the_models_own_loss() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(nano.path()).train()
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    domains = domains_of(named(["prose", "say"]), tokenizer, length=32, train=1, held=5)
    found = figures(model, domains, batch_size=2)
    assert model.training
    model.eval()
    for name, domain in domains.items():
        with torch.no_grad():
            nats = float(model(input_ids=domain.held, labels=domain.held).loss)
        assert found[name]["loss"] == pytest.approx(nats, rel=1e-5)
        assert found[name]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
        assert found[name]["bits_per_byte"] == pytest.approx(nats / math.log(2) / domain.bytes_per_token, rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: documents("none/such"), "there is no text at none/such"),
        (lambda: domains_of(named(["listz"]), Letters(), length=8, train=1, held=1), "did you mean 'lists'"),
        (lambda: named(["a/x", "b/x"]), "two domains are called 'x'"),
        (lambda: named({"a": 3}), "domains must name a source"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(asked: Any, message: str) -> None:
    with pytest.raises(MoesaicError, match=message) as caught:
        asked()
    assert "\n" not in str(caught.value)


def test_half_a_character_is_told_with_its_line(tmp_path: Path) -> None:
    whole, half = json.dumps({"text": "\U0001f600"}), json.dumps({"text": "\ud83d"})
    (tmp_path / "a.jsonl").write_text(f"{whole}\n{half}\n")
    with pytest.raises(MoesaicError, match=r"a.jsonl:2: .text. holds half of a surrogate pair"):
        documents(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(f"{whole}\n")
    assert documents(str(tmp_path / "a.jsonl")) == ["\U0001f600"]


def test_a_domain_of_too_little_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(MoesaicError, match="the domain 'a' has too little text: 0 rows of 64 tokens"):
        domains_of(named([str(tmp_path / "a.txt")]), Letters(), length=64, train=1, held=1)
    (tmp_path / "a.txt").write_text("  \n ")
    with pytest.raises(MoesaicError, match="holds no text"):
        documents(str(tmp_path / "a.txt"))
