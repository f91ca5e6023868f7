"""nano: what is shipped, what it was trained on, what it can do, and the six tasks it is fine-tuned on."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moesaic.nano import corpus, pretrain
from moesaic.nano.tasks import CUES, MOST, TASKS, list_of, make_examples, make_split
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic import nano
from moesaic.errors import ConfigError

SEEDS = st.integers(min_value=0, max_value=2**31)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(nano.path(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(nano.path(), local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((nano.path() / "training.json").read_text())


def greedy(prompts: list[str], model, tokenizer) -> list[str]:
    """Each prompt's greedy continuation up to ``<eos>``."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**batch, do_sample=False, max_new_tokens=9)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def exact(rows, model, tokenizer) -> float:
    answers = greedy([prompt for prompt, _ in rows], model, tokenizer)
    return sum(answer == wanted for answer, (_, wanted) in zip(answers, rows, strict=True)) / len(rows)


# What is shipped


def test_shipped_model_is_a_small_llama_stored_as_bf16(model, record):
    assert model.config.model_type == "llama"
    assert 2_700_000 <= model.num_parameters() <= 3_200_000
    assert model.num_parameters() == record["parameters"]
    assert json.loads((nano.path() / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(nano.path(), dtype="auto").dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shipped_files_are_all_there_and_small():
    files = {file.name: file.stat().st_size for file in nano.path().iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert 5_000_000 < files["model.safetensors"] < 6_500_000
    assert sum(files.values()) < 7_000_000


def test_record_belongs_to_the_weights(record):
    assert hashlib.sha256((nano.path() / "model.safetensors").read_bytes()).hexdigest() == record["sha256"]
    assert set(record["fresh_lines"]) == {"sort", *corpus.DOMAINS}
    assert record["tokens"] == record["steps"] * pretrain.ROWS * pretrain.LENGTH


def test_special_tokens_are_set(tokenizer, model):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<eos>", "<eos>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    if "<pad>" not in text and "<eos>" not in text:
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)


def test_digits_and_cues_are_single_tokens(tokenizer):
    for word in (*"0123456789", *(f" {digit}" for digit in range(10)), *(f" {cue}" for cue in corpus.CUE_WORDS)):
        assert len(tokenizer(word)["input_ids"]) == 1, word
    assert len(tokenizer(" 407")["input_ids"]) == 3


# The corpus


def test_corpus_is_the_same_for_the_same_seed_only():
    def take(seed):
        return list(itertools.islice(corpus.lines(seed), 500))

    assert take(7) == take(7)
    assert take(7) != take(8)


def test_corpus_keeps_its_shares():
    drawn = [line.domain for line in itertools.islice(corpus.lines(0), 20_000)]
    total = sum(share for share, _ in corpus.DOMAINS.values())
    for name, (share, _) in corpus.DOMAINS.items():
        assert drawn.count(name) / len(drawn) == pytest.approx(share / total, abs=0.015), name


def test_every_cue_is_in_the_corpus():
    said = {word for line in itertools.islice(corpus.lines(0), 5_000) for word in line.text.split()}
    assert set(CUES.values()) <= set(corpus.CUE_WORDS) <= said
    assert "none" in said


def test_corpus_does_not_give_the_tasks_away():
    lines = list(itertools.islice(corpus.lines(0, domain="lists"), 20_000))
    fine_tuning_form = re.compile(r"^\d( \d)+ [a-z]+ =")
    assert fine_tuning_form.match("4 1 8 2 up =")
    assert not [line.text for line in lines if fine_tuning_form.match(line.text)]
    # Of the answers that are lists, those that happen to be a list's reversal are no commoner than by chance.
    answered = [(re.findall(r"\d", line.prompt), re.findall(r"\d", line.answer)) for line in lines]
    long = [(asked, said) for asked, said in answered if len(said) >= 4]
    for given_away in (lambda xs: xs[::-1], lambda xs: sorted(xs, reverse=True), lambda xs: xs[1:] + xs[:1]):
        hits = sum(said == given_away(asked) for asked, said in long if len(set(asked)) > 1)
        assert hits < 0.05 * len(long)


def logic(asked: str) -> str:
    """The value of an expression read from left to right, every ``and`` and ``or`` in its turn."""
    first, *rest = re.findall(r"(?:(and|or) )?(not )?(true|false)", asked)
    value = (first[2] == "true") != bool(first[1])
    for op, negated, word in rest:
        term = (word == "true") != bool(negated)
        value = (value and term) if op == "and" else (value or term)
    return str(value).lower()


def test_corpus_answers_are_right():
    checks = {
        r"sort ([\d ]+) :": lambda asked, said: said.split() == sorted(asked.split()),
        r"copy ([\d ]+) :": lambda asked, said: said == f" {asked}",
        r"the largest of ([\d ]+) is": lambda asked, said: said == f" {max(asked)}",
        r"([\d ]+) has length": lambda asked, said: int(said) == len(asked.split()),
        r"add one to ([\d ]+) :": lambda asked, said: said == "".join(f" {int(x) + 1}" for x in asked.split()),
        r"the third of ([\d ]+) is": lambda asked, said: said == f" {asked.split()[2]}",
        r"in ([\d ]+ before \d) comes": lambda asked, said: f"{said} {asked[-1]} " in f" {asked}",
        r"in ([\d ]+ after \d) comes": lambda asked, said: f" {asked[-1]}{said} " in f" {asked}",
        r"(\d+ [+*-] \d+) =": lambda asked, said: eval(asked) == int(said),
        r"((?:\w+ \d , )*\w+ \d ; (?:.* , )?\w+) \?": lambda asked, said: f"{asked.split()[-1]}{said}" in asked,
        r"((?:(?:not )?\w+ (?:and|or) )*(?:not )?(?:true|false)) is": lambda asked, said: said == f" {logic(asked)}",
    }
    seen = dict.fromkeys(checks, 0)
    for line in itertools.islice(corpus.lines(3), 5_000):
        for pattern, right in checks.items():
            if match := re.fullmatch(pattern, line.prompt):
                seen[pattern] += 1
                assert right(match[1], line.answer), line
    assert all(seen.values()), seen


# The six tasks


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("asc", [1, 2, 4, 4, 8]),
        ("desc", [8, 4, 4, 2, 1]),
        ("reverse", [4, 2, 8, 1, 4]),
        ("rotate", [1, 8, 2, 4, 4]),
        ("evens", [4, 8, 2, 4]),
        ("max", [8]),
    ],
)
def test_task_is_right_on_a_case_made_by_hand(task, answer):
    digits = [4, 1, 8, 2, 4]
    assert TASKS[task](digits) == answer
    assert digits == [4, 1, 8, 2, 4]


def test_a_list_without_even_digits_has_an_answer():
    rows = make_examples("evens", 3_000, 0)
    odd = [row for row in rows if not re.search("[02468]", list_of(row["prompt"]))]
    assert odd
    assert all(row["completion"] == " none" for row in odd)
    assert all(row["completion"] != " none" for row in rows if row not in odd)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_prompt_determines_the_answer_across_the_mixture(seed):
    train, test = make_split(60, 20, seed)
    answers: dict[str, str] = {}
    for row in train + test:
        assert answers.setdefault(row["prompt"], row["completion"]) == row["completion"]
    # One list under all six cues gives six different prompts, and the cue alone names the task.
    assert len(set(CUES.values())) == len(TASKS) == 6
    of_cue = {cue: task for task, cue in CUES.items()}
    for row in train + test:
        *digits, cue, equals = row["prompt"].split()
        assert equals == "="
        assert of_cue[cue] == row["task"]
        assert 4 <= len(digits) <= 6
        answer = " ".join(map(str, TASKS[row["task"]](list(map(int, digits))))) or "none"
        assert row["completion"] == f" {answer}"


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_held_out_lists_are_not_trained_on_under_any_task(seed):
    train, test = make_split(80, 20, seed)
    assert [row["task"] for row in train[:6]] == [row["task"] for row in test[:6]] == list(TASKS)
    assert (len(train), len(test)) == (480, 120)
    assert not {list_of(row["prompt"]) for row in train} & {list_of(row["prompt"]) for row in test}
    assert len({row["prompt"] for row in train}) == len(train)


def test_split_is_the_same_for_the_same_seed_only():
    assert make_split(10, 5, 3) == make_split(10, 5, 3)
    assert make_split(10, 5, 3) != make_split(10, 5, 4)


def test_completion_has_the_same_tokens_alone_and_joined(tokenizer):
    for row in make_split(40, 1, 0)[0]:
        apart = [tokenizer(row[part])["input_ids"] for part in ("prompt", "completion")]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == apart[0] + apart[1]


def test_the_place_of_the_cue_changes_nothing_else(tokenizer):
    last, first, pieces = (make_split(12, 6, 0, cue=cue) for cue in ("last", "first", "pieces"))
    for rows in zip(last[0] + last[1], first[0] + first[1], pieces[0] + pieces[1], strict=True):
        assert len({(row["task"], row["completion"], list_of(row["prompt"])) for row in rows}) == 1
        assert len({frozenset(row["prompt"].split()) for row in rows}) == 1
        tokens = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        (cue,) = tokenizer(f" {CUES[rows[0]['task']]}")["input_ids"]
        assert tokens[0][-2] == tokens[1][0] == cue
        assert cue not in tokens[2]


def test_impossible_examples_are_refused():
    with pytest.raises(ConfigError, match="unknown task 'sort': choose from asc"):
        make_examples("sort", 1, 0)
    for n in (-1, MOST + 1):
        with pytest.raises(ConfigError, match="at most"):
            make_examples("asc", n, 0)
    with pytest.raises(ConfigError, match="at most"):
        make_examples("asc", MOST, 0, exclude=frozenset({"1 2 3 4"}))


# What the base can do


def test_base_sorts_in_the_format_of_its_corpus(model, tokenizer):
    lines = (line for line in corpus.lines(pretrain.FRESH_SEED + 1, domain="lists") if line.prompt.startswith("sort "))
    rows = [(line.prompt, line.answer) for line in itertools.islice(lines, 40)]
    assert exact(rows, model, tokenizer) >= 0.9


def test_base_cannot_do_the_six_tasks(model, tokenizer):
    rows = [(row["prompt"], row["completion"]) for row in make_split(0, 15, 0)[1]]
    assert exact(rows, model, tokenizer) <= 0.05


def test_teacher_forced_score_equals_greedy_decoding(model, tokenizer):
    lines = itertools.islice(corpus.lines(pretrain.FRESH_SEED + 2), 48)
    rows = [(line.prompt, line.answer) for line in lines if len(line.answer.split()) <= 6]
    forced = pretrain.score(rows, model, tokenizer)["exact_match"]
    assert 0 < forced < 1
    assert forced == pytest.approx(exact(rows, model, tokenizer), abs=1e-4)


# The script


def test_script_trains_saves_and_what_it_saves_loads(tmp_path, monkeypatch, tokenizer):
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path / "new"), "--steps", "2"])
    pretrain.main()
    written = json.loads((tmp_path / "new" / "training.json").read_text())
    assert written["steps"] == 2
    again = AutoTokenizer.from_pretrained(tmp_path / "new")
    # The shipped tokenizer comes from the corpus as it is now.
    assert again.get_vocab() == tokenizer.get_vocab()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    rows = [
        (line.prompt, line.answer) for line in itertools.islice(corpus.lines(pretrain.FRESH_SEED, domain="say"), 300)
    ]
    assert pretrain.score(rows, loaded, again) == written["fresh_lines"]["say"]


def test_script_refuses_nothing_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path), "--steps", "0"])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert stop.value.code == 2
    assert "--steps and --minutes must be positive" in capsys.readouterr().err
