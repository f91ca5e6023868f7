"""Chats, templates, tokenizers and lengths: an answer ends as its template says, and what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from moesaic import nano
from moesaic.cli.main import main
from moesaic.data import causal
from moesaic.data.examples import load, parse
from moesaic.errors import ConfigError, DataError
from moesaic.evaluation.answers import ends
from moesaic.models.embedded import LoadedModel, load_model
from moesaic.runs.recipe import load_recipe
from moesaic.training.prepared import Prepared, training_rows
from tests import tiny_folders

TURNS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
REWRITING = (
    "{{ messages | length }}:{% for m in messages %} {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
EOS = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def tokenizer(template: str | None) -> Any:
    made = AutoTokenizer.from_pretrained(str(nano.path()))
    made.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>", "<think>", "</think>"]})
    made.chat_template = template
    return made


def chat(*contents: str) -> Any:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return parse({"task": "t", "messages": turns}, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("template", "earlier", "learned"),
    [
        (TURNS, "yes<end>", "1 4<end>"),
        (THINKING, "", "<think>\n\n</think>\n\n1 4<end>"),
        (REWRITING, "", "1 4<end>"),
        (BARE, "yes", "1 4<eos>"),
        (EOS, "yes<eos>", "1 4<eos>"),
    ],
)
def test_answers_end_as_their_template_says(
    template: str, earlier: str, learned: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = tokenizer(template)
    for example in (chat("sort 4 1", "1 4"), chat("hi", "yes", "sort 4 1", "1 4")):
        (row,) = causal.tokenize([example], made, ["t"], max_length=128)
        several = len(example.messages) > 2
        assert made.decode([i for i in row["labels"] if i >= 0]) == (earlier if several else "") + learned
        assert ("the last answer alone is learned" in caplog.text) == (several and not earlier)
        whole = made.apply_chat_template(
            [{"role": role, "content": content} for role, content in example.messages], tokenize=False
        )
        if template is not REWRITING:
            assert made.decode(row["input_ids"]).removesuffix("<eos>") == whole.rstrip().removesuffix("<eos>")
        assert row["input_ids"][-1] == causal.closing_ids([example], made)[-1 if "<end>" in learned else 0]


R1 = (
    "{% for m in messages %}<turn>{{ m['role'] }}:{{ m['content'].split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:<think>\n{% endif %}"
)
WORDS = "{% for m in messages %}|{{ m['role'] }}|{{ m['content'] }}|END|\n{% endfor %}" + (
    "{% if add_generation_prompt %}|assistant|{% endif %}"
)


@pytest.mark.parametrize("answer", ["e", "end", "<end", "d>", "a b"])
def test_an_answer_is_found_by_its_place_not_by_its_letters(answer: str) -> None:
    made = tokenizer(R1)
    assert made.decode(causal.answer_ids(chat("q", "e n d"), answer, made)) == f"{answer}<end>"


@pytest.mark.parametrize("contents", [("hi", "yes"), ("hi", "a | b", "so?", "1")])
def test_a_turn_that_ends_in_plain_text_is_ended_by_eos(contents: tuple[str, ...]) -> None:
    made, example = tokenizer(WORDS), chat(*contents)
    (row,) = causal.tokenize([example], made, ["t"], max_length=128)
    assert causal.answer_ids(example, contents[-1], made)[-1] == made.eos_token_id
    assert made.decode([i for i in row["labels"] if i >= 0]).endswith(f"{contents[-1]}<eos>")
    assert causal.closing_ids([example], made) == [made.eos_token_id]


def test_a_chat_may_begin_with_the_assistant() -> None:
    said = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}"
    made = tokenizer(said + TURNS)
    turns = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"}]
    example = parse({"task": "t", "messages": [*turns, {"role": "assistant", "content": "1 4"}]}, "rows.jsonl:1")
    (row,) = causal.tokenize([example], made, ["t"], max_length=128)
    assert made.decode([i for i in row["labels"] if i >= 0]) == "hello<end>1 4<end>"


def test_a_template_that_marks_nothing_of_a_chat_is_read_as_one_without_marks(caplog: pytest.LogCaptureFixture) -> None:
    said = "{{ m['content'] }}<end>"
    marks = (
        "{% if 'good' in m['content'] %}{% generation %}"
        + said
        + "{% endgeneration %}{% else %}"
        + said
        + "{% endif %}"
    )
    made = tokenizer(
        "{% for m in messages %}<turn>{{ m['role'] }}\n" + marks + "\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    rows = causal.tokenize([chat("hi", "yes", "q", "1 4"), chat("q", "good")], made, ["t"], max_length=128)
    assert [made.decode([i for i in row["labels"] if i >= 0]) for row in rows] == ["yes<end>1 4<end>", "good<end>"]
    assert "alone is learned" not in caplog.text


def test_a_token_that_the_model_does_not_embed_is_told_before_it_is_trained_on() -> None:
    loaded = load_model("nano")
    loaded.tokenizer = tokenizer(TURNS)
    prepared = Prepared(loaded.model, loaded, ("t",), None, load_recipe("lora", ["max_length=64"]))
    with pytest.raises(
        ConfigError, match=r"the tokenizer writes token \d+ \(<end>\), and the model embeds \d+: resize"
    ):
        training_rows(prepared, [chat("sort 4 1", "1 4")])
    loaded.model.resize_token_embeddings(len(loaded.tokenizer))
    assert len(training_rows(prepared, [chat("sort 4 1", "1 4")])) == 1


def test_rows_that_are_cut_say_where_and_what_would_take_them_whole(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer(TURNS)
    causal.tokenize([chat("sort 4 1 8 3 7", "1 4"), chat("4", "1")], made, ["t"], max_length=20)
    said = caplog.messages[-1]
    assert said.startswith("1 of 2 rows were cut to max_length=20 tokens, from the start of their prompts; max_length=")
    caplog.clear()
    causal.tokenize(
        [chat("sort 4 1 8 3 7", "1 4")], made, ["t"], max_length=int(said.split("max_length=")[2].split()[0])
    )
    assert not caplog.messages


LONG = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "sort 4 1"},
    {"role": "assistant", "content": "1 4"},
    {"role": "user", "content": "and 9 2 7?"},
    {"role": "assistant", "content": "2 7 9, \n then"},
]


@pytest.mark.parametrize("turns", [3, 5], ids=["one", "two"])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "qwen3", "gemma3", "turns"])
def test_the_labels_are_those_of_trl(name: str, turns: int, tmp_path: Path) -> None:
    """`assistant_only_loss`, where TRL knows the template or the template marks the assistant's turns itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text() if name != "turns" else None
    ours = tokenizer(template or TURNS.replace("{{ raise_exception('System role not supported') }}", ""))
    theirs = tokenizer(template or ours.chat_template)
    if name == "turns":
        said = "{{ m['content'] | trim }}<end>"
        marked = "{% if m['role'] == 'assistant' %}{% generation %}" + said + "{% endgeneration %}{% else %}"
        theirs.chat_template = theirs.chat_template.replace(f"{said}\n", marked + said + "{% endif %}{{ '\n' }}")
    args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, report_to=[], use_cpu=True)
    data = Dataset.from_list([{"messages": LONG[:turns]}])
    trainer = SFTTrainer(load_model("nano").model, args=args, train_dataset=data, processing_class=theirs)
    trainer.model.resize_token_embeddings(len(theirs))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    example = parse({"task": "t", "messages": LONG[:turns]}, "x")
    (row,) = causal.tokenize([example], ours, ["t"], max_length=512)
    wanted, length = batch["labels"][0].tolist(), len(row["labels"])
    assert row["labels"] == wanted[:length]
    assert row["input_ids"] == batch["input_ids"][0].tolist()[:length]
    assert set(wanted[length:]) <= {causal.IGNORED}
    assert sum(label >= 0 for label in wanted) >= 3 * (turns // 2)


def test_rows_of_prompt_and_answer_go_through_the_template() -> None:
    made = tokenizer(TURNS)
    pick = parse({"task": "t", "prompt": "first 4 1", "choices": ["4", "1"], "answer": 1}, "x")
    write = parse({"task": "t", "prompt": "sort 4 1", "completion": "1 4"}, "x")
    for example, answer in ((pick, "1"), (write, "1 4")):
        asked = causal.as_chat(example)
        (row,) = causal.tokenize([asked], made, ["t"], max_length=64)
        text = f"<turn>user\n{example.prompt}<end>\n<turn>assistant\n{answer}<end>"
        assert made.decode(row["input_ids"]) == text
        assert made.decode([i for i in row["labels"] if i >= 0]) == f"{answer}<end>"
        assert (asked.choices, causal.question(asked)) == (example.choices, example.prompt)
    assert made.decode(causal.answer_ids(causal.as_chat(pick), "4", made)) == "4<end>"


def test_generation_stops_where_the_rows_answers_end() -> None:
    made = tokenizer(TURNS)
    end = made.convert_tokens_to_ids("<end>")

    class Model:
        generation_config = type("G", (), {"eos_token_id": [7, 9]})

    prepared: Any = type("P", (), {"model": Model(), "base": LoadedModel(None, made, "causal")})
    assert ends(prepared, [chat("q", "a")]) == sorted({7, 9, end, made.eos_token_id})
    plain = parse({"task": "t", "prompt": "p", "completion": "c"}, "x")
    assert ends(prepared, [plain]) == sorted({7, 9, made.eos_token_id})


def rows(path: Path, *found: dict[str, Any]) -> Path:
    for split in ("train", "validation"):
        file = path / "t" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


SAID = {"task": "t", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SYSTEM = {"task": "t", "messages": [{"role": "system", "content": "be nice"}, *SAID["messages"]]}


def test_what_a_template_refuses_is_named_by_file_and_line(tmp_path: Path) -> None:
    examples = load(rows(tmp_path, SAID, SYSTEM))
    with pytest.raises(DataError, match=r"train\.jsonl:2: this model's chat template refuses .* System role not supp"):
        causal.tokenize(examples, tokenizer(TURNS), ["t"], max_length=64)
    for template, message in (
        ("{% for m in messages %}{{ m['content'] }", "cannot be read"),
        ("{{ nothing.there }}", "refuses the chat"),
        ("{{ 1 / 0 }}", "refuses the chat: division by zero"),
        ("{{ messages[7]['role'] + 3 }}", "refuses the chat"),
        (None, "has no chat template"),
    ):
        with pytest.raises((DataError, ConfigError), match=message) as error:
            causal.tokenize(examples[:1], tokenizer(template), ["t"], max_length=64)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="the chat is one message"):
        parse({"task": "t", "messages": SAID["messages"][1:]}, "x:1")


def test_a_tokenizer_without_an_end_is_told() -> None:
    made = tokenizer(None)
    made.eos_token = None
    example = parse({"task": "t", "prompt": "p", "completion": "c"}, "x")
    with pytest.raises(ConfigError, match="has no EOS token"):
        causal.tokenize([example], made, ["t"], max_length=64)


# -- lengths -----------------------------------------------------------------------------------------------------------


def test_positions_are_read_off_the_model() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ffn = {"intermediate_size": 16}
    opt = OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=20)
    models: dict[int | None, Any] = {
        20: OPTForCausalLM(opt),
        12: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=12)),
        24: BertModel(BertConfig(**small, **ffn, max_position_embeddings=24)),
        28: RobertaModel(RobertaConfig(**small, **ffn, max_position_embeddings=30)),
        None: AutoModelForCausalLM.from_config(LlamaConfig(**small, **ffn, max_position_embeddings=8)),
    }
    for wanted, model in models.items():
        assert LoadedModel(model, None, "causal").positions == wanted, type(model).__name__
        if wanted is not None:
            model.eval()(input_ids=torch.full((1, wanted), 5))


@pytest.mark.parametrize("positions", [13, 16, 20])
def test_rows_and_answers_are_cut_to_the_models_positions(
    tmp_path: Path, capsys: Any, caplog: Any, positions: int
) -> None:
    model = tiny_folders.save_model(tmp_path / "model", "causal")
    made = tiny_folders.tokenizer(encoder=False)
    config = GPT2Config(
        vocab_size=len(made), n_embd=16, n_head=2, n_layer=1, n_positions=positions, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(model)
    data = rows(tmp_path / "data", *({"task": "t", "prompt": "sort " + "4 " * n, "completion": "1 4"} for n in (3, 40)))
    asked = [f"model={model}", f"data={data}", f"out={tmp_path / 'run'}", "steps=2", "batch_size=2", "adapter.r=2"]
    assert main(["train", "mola", *asked, "adapter.num_experts=2", "adapter.top_k=1"]) == 0
    assert f"cut to max_length={positions}" in caplog.text
    assert main(["eval", str(tmp_path / "run"), f"data={data}"]) == 0
    assert main(["inspect", str(tmp_path / "run"), f"prompt={'sort ' + '4 ' * 40}"]) == 0
    capsys.readouterr()


def test_answers_longer_than_the_model_are_told(tmp_path: Path, capsys: Any) -> None:
    model = tiny_folders.save_model(tmp_path / "model", "causal")
    config = GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=1, n_positions=12, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(model)
    data = rows(tmp_path / "data", {"task": "t", "prompt": "sort", "completion": "4 " * 30})
    asked = [f"model={model}", f"data={data}", f"out={tmp_path / 'run'}", "steps=1", "batch_size=1", "adapter.r=2"]
    assert main(["train", "lora", *asked]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), f"data={data}"]) == 2
    assert "answers of 31 tokens, and the model 12 positions" in "".join(capsys.readouterr())


# -- what would be lost, and what cannot be ----------------------------------------------------------------------------


def test_tools_are_told_and_not_dropped() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "sort"}}]}
    with pytest.raises(DataError, match="'tool_calls' is not read"):
        parse({"task": "t", "messages": [SAID["messages"][0], call]}, "x:1")
    with pytest.raises(DataError, match="'tools' are not read"):
        parse(SAID | {"tools": [{"name": "sort"}]}, "x:1")


def closing_folder(folder: Path, *, post: str = "$A <eos>", **special: Any) -> Path:
    """A tiny model whose tokenizer closes every text."""
    from tokenizers import processors

    model = tiny_folders.save_model(folder, "causal")
    made = tiny_folders.tokenizer(encoder=False)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<eos>", 1)])
    for name, value in special.items():
        setattr(made, name, value)
    made.save_pretrained(model)
    return model


def test_inspect_reads_a_prompt_as_evaluation_does(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    data = rows(tmp_path / "data", {"task": "t", "prompt": "sort 4 1 :", "completion": "1 4"})
    asked = [f"model={closing_folder(tmp_path / 'model')}", f"data={data}", f"out={tmp_path / 'run'}", "max_length=8"]
    assert main(["train", "mola", *asked, "steps=1", "batch_size=1", "adapter.r=2", "adapter.num_experts=2"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), f"prompt={'x ' * 30}4 1 :", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tokens = [token["text"] if isinstance(token, dict) else token for token in said["tokens"]]
    assert [token.strip() for token in tokens][-3:] == ["4", "1", ":"], "its end, and no closing token"
    assert "may be cut" in caplog.text


def test_tokens_that_the_model_does_not_embed_are_told(tmp_path: Path) -> None:
    model = closing_folder(tmp_path / "model", pad_token="<new>")
    with pytest.raises(ConfigError, match=r"pad_token of .* and the model embeds"):
        load_model(str(model))


def test_nothing_to_answer_is_told_and_one_answer_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    model = tiny_folders.save_model(tmp_path / "model", "causal")
    asks = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(asks | {"num_return_sequences": 2, "num_beams": 2}))
    data = rows(tmp_path / "data", {"task": "t", "prompt": "sort 4 1 :", "completion": "1 4"})
    asked = [f"model={model}", f"data={data}", f"out={tmp_path / 'run'}", "steps=1", "batch_size=1", "adapter.r=2"]
    assert main(["train", "lora", *asked]) == 0
    assert main(["eval", str(tmp_path / "run"), f"data={data}"]) == 0
    empty = rows(tmp_path / "empty", {"task": "t", "prompt": "", "completion": "1 4"})
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), f"data={empty}"]) == 2
    assert "an empty prompt, and the tokenizer has no token to begin with" in "".join(capsys.readouterr())


def test_prompts_that_cannot_be_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, message in (("encoder", "is an encoder, which has no chat template"), ("causal", "has no chat template")):
        model = tiny_folders.save_model(tmp_path / kind, kind)
        data = tiny_folders.write_tasks(tmp_path / f"{kind}-data", kind)
        asked = ["train", "lora", f"model={model}", f"data={data}", "steps=1", f"out={tmp_path / 'run'}"]
        assert main([*asked, "prompts=chat"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert main([*asked, "prompts=template"]) == 2
    assert "prompts=template; known: auto, chat, plain" in capsys.readouterr().err
