"""Data: shapes of rows and files that hold them, and one clear line for everything that can be wrong with them."""

import csv
import json
import logging
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data import examples as data
from moesaic.data.hub import unreachable
from moesaic.errors import ConfigError, DataError
from moesaic.models.embedded import load_model

CHOICE = {"task": "t", "prompt": "p", "choices": ["a", "b"], "answer": 1}
COMPLETION = {"task": "t", "prompt": "p", "completion": "c", "answer": "7"}
CHAT = {"task": "t", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_reads_the_three_shapes_and_skips_blank_lines(tmp_path):
    file = write(tmp_path / "x.jsonl", [CHOICE, "", COMPLETION, CHAT])
    choice, completion, chat = data.load(file)
    assert choice == data.Example("t", "p", choices=("a", "b"), answer=1)
    assert choice.label == 1
    assert completion == data.Example("t", "p", "c", answer="7")
    assert chat.messages == (("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"task": "t", ', "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"task": " ", "prompt": "p"}', "'task' is empty"),
        ('{"task": "t", "completion": "c"}', 'a row is {"prompt", "completion"}, {"prompt", "choices", "answer"}, '),
        ('{"task": "t", "text": "c"}', "this one has task, text"),
        ('{"task": "t", "prompt": "p"}', "this one has a prompt and nothing to answer"),
        ('{"instruction": "i", "output": 4}', "'completion' must be text, got int"),
        ('{"task": 3, "prompt": "p", "completion": "c"}', "'task' must be text, got int"),
        ('{"task": "t", "prompt": "p", "completion": 4}', "'completion' must be text, got int"),
        (json.dumps({**CHOICE, "answer": 2}), "'answer' is 2, but there are 2 choices"),
        (json.dumps({**CHOICE, "answer": -1}), "'answer' is -1"),
        (json.dumps({**CHOICE, "answer": True}), "must be one of 'choices'"),
        (json.dumps({**CHOICE, "answer": "c"}), "must be one of 'choices', or an index into them, got 'c'"),
        (json.dumps({k: v for k, v in CHOICE.items() if k != "answer"}), "'answer' is missing"),
        (json.dumps({**CHOICE, "choices": ["a"]}), "at least two"),
        (json.dumps({**CHOICE, "choices": "ab"}), "must be a list"),
        (json.dumps({**CHAT, "messages": []}), "'messages' must be a list"),
        (json.dumps({**CHAT, "messages": [{"role": "user", "content": "q"}]}), "must be the assistant's"),
        (json.dumps({**CHAT, "messages": [{"role": "user"}]}), "'content' is missing"),
        (json.dumps({**CHAT, "messages": ["hi"]}), "messages[0] must be an object"),
    ],
)
def test_a_bad_line_names_file_line_and_reason(tmp_path, line, reason):
    file = write(tmp_path / "x.jsonl", [CHOICE, line])
    with pytest.raises(DataError) as caught:
        data.load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:2: ")
    assert reason in message
    assert "\n" not in message


def test_skipped_lines_are_counted(tmp_path, caplog):
    file = write(tmp_path / "x.jsonl", [CHOICE, "{", "[]", CHOICE])
    with caplog.at_level(logging.WARNING):
        assert len(data.load(file, on_bad_lines="skip")) == 2
    assert "skipped 2 bad lines, kept 2" in caplog.text


@pytest.mark.parametrize("content", ["", "\n\n", "{"])
def test_a_file_without_examples_is_refused(tmp_path, content):
    file = write(tmp_path / "x.jsonl", [content])
    with pytest.raises(DataError, match="no examples"):
        data.load(file, on_bad_lines="skip")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        data.load(file)


def test_a_folder_of_tasks(tmp_path):
    for task in ("one", "two"):
        write(tmp_path / task / "train.jsonl", [{**CHOICE, "task": task}])
    write(tmp_path / "one" / "validation.jsonl", [{**CHOICE, "task": "one"}])
    assert [e.task for e in data.load(tmp_path)] == ["one", "two"]
    assert [e.task for e in data.load(tmp_path, tasks=["two", "one"])] == ["two", "one"]
    with pytest.raises(DataError, match=r"no task 'onne' in .* did you mean 'one'\? known: one, two"):
        data.load(tmp_path, tasks=["onne"])
    with pytest.raises(DataError, match="task 'two' has no validation split"):
        data.load(tmp_path, "validation")
    with pytest.raises(DataError, match="unknown split 'valid'; did you mean 'validation'"):
        data.load(tmp_path, "valid")


def test_a_row_of_another_task_in_a_tasks_folder_is_refused(tmp_path):
    write(tmp_path / "one" / "train.jsonl", [CHOICE])
    with pytest.raises(DataError, match="task is 't'; in folder 'one' it must be 'one'"):
        data.load(tmp_path)


def test_a_folder_with_the_split_itself(tmp_path):
    write(tmp_path / "train.jsonl", [CHOICE, {**COMPLETION, "task": "u"}])
    assert [e.task for e in data.load(tmp_path, tasks=["u"])] == ["u"]
    with pytest.raises(DataError, match="no task 'v'"):
        data.load(tmp_path, tasks=["v"])


def test_a_split_that_is_a_file_and_in_a_tasks_folder_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", [CHOICE])
    write(tmp_path / "b" / "validation.jsonl", [{**CHOICE, "task": "b"}])
    assert len(data.load(tmp_path)) == 1
    write(tmp_path / "b" / "train.jsonl", [{**CHOICE, "task": "b"}])
    with pytest.raises(DataError, match=r"holds train\.jsonl and b/train\.jsonl: keep one file, or a folder a task"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ["missing.jsonl", "./nowhere", "/no/where", "nowhere/", "here/nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        data.load(name)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"neither train\.jsonl nor <task>/train\.jsonl"):
        data.load(tmp_path)


def test_the_digest_depends_on_rows_and_order():
    a, b = data.parse(CHOICE, ""), data.parse(COMPLETION, "")
    assert data.digest([a, b]) == data.digest([a, b])
    assert data.digest([a, b]) != data.digest([b, a])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *[
                            "task",
                            "prompt",
                            "choices",
                            "answer",
                            "completion",
                            "messages",
                            "role",
                            "content",
                            "instruction",
                            "output",
                        ]
                    ]
                ),
                x,
            )
        ),
    )
)
def test_any_json_value_parses_or_is_refused_in_one_typed_error(row):
    try:
        task = data.parse(row, "f:1").task
    except DataError as error:
        task = str(error).removeprefix("f:1: ")
        assert task != str(error)  # noqa: PT017  either outcome is right, as long as it is one of the two
    assert task


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100000, "not valid JSON"),
        (json.dumps({**COMPLETION, "prompt": "\ud800"}), "surrogate"),
        (json.dumps({**CHOICE, "task": "\ud800"}), "surrogate"),
        (json.dumps({**CHOICE, "choices": ["a", "\udfff"]}), "surrogate"),
        (json.dumps({**CHOICE, "choices": ["a", " "]}), "'choices' is empty"),
        (json.dumps({**CHOICE, "choices": ["b", "a", "a"]}), "right choice 'a' is there twice"),
        (json.dumps({**CHOICE, "completion": "c"}), "'choices' and 'completion' are both there: leave one of them out"),
        (
            '{"task": "t", "prompt": "p", "task": "u", "completion": "c"}',
            "'task' is there twice in one object: keep one",
        ),
        ('{"task": "t", "messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "'role' is there twice"),
        (json.dumps({**COMPLETION, "answer": [1]}), "'answer' must be a text or a number, got list"),
        (json.dumps({"task": "t", "prompt": "", "completion": ""}), "both empty"),
    ],
)
def test_a_row_that_nothing_could_be_learned_from_is_refused(tmp_path, line, reason):
    file = write(tmp_path / "x.jsonl", [CHOICE, line])
    with pytest.raises(DataError) as caught:
        data.load(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert reason in str(caught.value)
    assert len(data.load(file, on_bad_lines="skip")) == 1


def test_a_wrong_choice_may_be_there_twice(tmp_path):
    assert data.load(write(tmp_path / "x.jsonl", [{**CHOICE, "choices": ["a", "b", "a"]}]))


def test_a_gold_answer_is_an_index_or_the_choice_itself():
    assert data.parse({**CHOICE, "answer": "b"}, "") == data.parse(CHOICE, "")
    assert data.parse({**CHOICE, "answer": "1"}, "") == data.parse(CHOICE, "")
    numbers = {**CHOICE, "choices": ["1", "0"], "answer": "0"}
    assert data.parse(numbers, "").label == 1, "a text that is a choice is that choice, whatever number it is"


def test_instructions_as_alpaca_has_them(tmp_path):
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "hi", "input": "", "output": "ho"}]
    file = tmp_path / "alpaca_data.json"
    file.write_text(json.dumps(rows))
    first, second = data.load(file)
    assert first == data.Example("alpaca_data", "add\n\n1 2", "3")
    assert second == data.Example("alpaca_data", "hi", "ho")
    assert first.where == f"{file}, row 1"


def test_rows_without_a_task_are_their_files_or_their_folders(tmp_path):
    row = {"prompt": "p", "completion": "c"}
    for place in ("sums.jsonl", "sql/train.jsonl", "own/one/train.jsonl"):
        write(tmp_path / place, [row])
    assert [e.task for e in data.load(tmp_path / "sums.jsonl")] == ["sums"]
    assert [e.task for e in data.load(tmp_path / "sql" / "train.jsonl")] == ["sql"]
    assert [e.task for e in data.load(tmp_path / "sql")] == ["sql"]
    assert [e.task for e in data.load(tmp_path / "own")] == ["one"]


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    plain = {"task": "t", "prompt": 'say "a",\nor b', "completion": "c"}
    write(tmp_path / "x.jsonl", [plain, CHOICE, CHAT])
    (tmp_path / "list.json").write_text(json.dumps([plain, CHOICE, CHAT]))
    write(tmp_path / "lines.json", [plain, CHOICE, CHAT])
    names = ["task", "prompt", "completion", "choices", "answer", "messages"]
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        for row in (plain, CHOICE, CHAT):
            table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    columns = {name: [row.get(name) for row in (plain, CHOICE, CHAT)] for name in names}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    found = [data.load(tmp_path / name) for name in ("x.jsonl", "list.json", "lines.json", "x.csv", "x.parquet")]
    assert all(rows == found[0] for rows in found)


def test_tables_that_do_not_fit_say_where(tmp_path, caplog):
    (tmp_path / "twice.csv").write_text("prompt,completion,prompt \na,b,c\n")
    with pytest.raises(DataError, match=r"twice\.csv: two columns are called 'prompt'"):
        data.load(tmp_path / "twice.csv")
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\nc\nd,e\n")
    with pytest.raises(DataError, match=r"x\.csv:3: it has another number of fields"):
        data.load(tmp_path / "x.csv")
    assert len(data.load(tmp_path / "x.csv", on_bad_lines="skip")) == 2
    (tmp_path / "y.csv").write_text('prompt,completion\na,"b\n')
    with pytest.raises(DataError, match=r"y\.csv: no CSV: .* \(a quote that does not end\?\)"):
        data.load(tmp_path / "y.csv")
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"z\.parquet: no Parquet file that can be read"):
        data.load(tmp_path / "z.parquet")
    write(tmp_path / "w.json", ["[1,"])
    with pytest.raises(DataError, match=r"w\.json: not valid JSON"):
        data.load(tmp_path / "w.json")


def test_a_folder_of_tables(tmp_path):
    for task in ("one", "two"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.csv").write_text("prompt,completion\na,b\n")
    assert [e.task for e in data.load(tmp_path)] == ["one", "two"]
    assert data.has_split(tmp_path, "train")
    write(tmp_path / "one" / "train.jsonl", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(DataError, match=r"one holds train\.jsonl and train\.csv: keep one"):
        data.load(tmp_path)


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(tmp_path, monkeypatch):
    def asked(*_):
        raise socket.gaierror

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    unreachable.cache_clear()
    try:
        began = time.monotonic()
        with pytest.raises(DataError, match=r"'taks' .* \(did you mean 'tasks'\?\) .* the hub cannot be reached"):
            data.load("taks")
        with pytest.raises(ConfigError, match=r"did you mean 'nano'.* was not fetched before, and the hub cannot be"):
            load_model("nan")
        assert time.monotonic() - began < 20, "of half a minute and more that asking takes"
    finally:
        unreachable.cache_clear()
