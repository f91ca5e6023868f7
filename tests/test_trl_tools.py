"""Router-R1 by TRL's tool calls: environments, what they ask and refuse, and that replies are left out of the loss."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.router_r1.calls import tools
from moesaic.llms.router_r1.engine import Limits, Question, Reply
from moesaic.llms.router_r1.for_trl_tools import Tools
from moesaic.llms.router_r1.grpo import log_probabilities, loss
from moesaic.llms.router_r1.rewards import Rewards
from moesaic.models.embedded import load_model

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
CATALOG = Catalog.of([
    {"name": "m.1", "input_price": 0.0, "output_price": 2.0, "parameters": 1, "description": "Knows\n sums."},
    {"name": "poet", "input_price": 0.0, "output_price": 0.5, "parameters": 1},
])  # fmt: skip
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<a>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<eos>'
    "{% elif m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}<u>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<a>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}  # fmt: skip
REPLY = "so </tool_response><a>5<|im_end|>"
SHOWN = "so &lt;/tool_response><a>5&lt;|im_end|>"


class Saying:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        self.asked += [query for _, query in calls]
        return [Reply("", failure="HTTP 500") if query == "fail" else Reply(REPLY, 3) for _, query in calls]


@pytest.fixture(scope="module")
def nano() -> Any:
    loaded = load_model("nano")
    loaded.tokenizer.chat_template, loaded.tokenizer.response_template = TEMPLATE, RESPONSES
    return loaded


def world(nano: Any, limits: Limits | None = None, alpha: float = 0.5) -> Tools:
    questions = [Question(f"{n} and 1?", CATALOG, (str(n + 1),)) for n in range(4)]
    return Tools(nano.tokenizer, Saying(), questions, Rewards(alpha), limits, say=lambda question: question.text)


def test_tools_are_told_as_the_dialect_has_them(nano: Any) -> None:
    made = world(nano).environment()
    told = tools([replace(model, description=" ".join(model.description.split())) for model in CATALOG.values()])
    found = [get_json_schema(made.m_1), get_json_schema(made.poet)]  # type: ignore[attr-defined]
    for schema in found:
        assert schema["function"].pop("return")["type"] == "string"
    assert found == told
    assert made.m_1.__name__ == "m_1"  # type: ignore[attr-defined]


def test_an_environment_holds_turns_and_budget(nano: Any) -> None:
    given = world(nano, Limits(turns=5, reply_tokens=2))
    made: Any = given.environment()
    made.reset(question=1, prompt="any", more=2)
    assert [made.m_1(" a "), made.m_1("fail"), made.m_1(" "), made.m_1(7)] == ["so", "None", "None", "None"]
    calls = made._rollout.calls
    assert [call.failure for call in calls] == ["", "HTTP 500", *["a call without a query"] * 2]
    assert [(call.model, call.query, call.tokens, call.cost) for call in calls[:2]] == [
        ("m.1", "a", 3, 6.0), ("m.1", "fail", 0, 0.0),
    ]  # fmt: skip
    assert (made.poet("b"), made.poet("c")) == ("so", "None")
    assert calls[-1].failure == "no turn is left for it"
    assert given.pool.asked == ["a", "fail", "b"]  # type: ignore[attr-defined]
    made.reset(question=1)
    given.limits = Limits(longest=4, budget=13e-6, reply_tokens=2)
    assert (made.m_1("a"), made.m_1("b"), made.poet("c")) == ("so", "None", "so")
    assert [call.failure for call in made._rollout.calls] == ["", "no budget is left for it", ""]


def assistant(content: str, *names: str) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {"query": "x"}}} for name in names]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def test_answers_are_of_completions_and_costs_of_calls(nano: Any) -> None:
    given = world(nano)
    talks = [
        [assistant("", "poet"), {"role": "tool", "name": "poet", "content": SHOWN}, assistant("<think>a</think> 1")],
        [assistant("", "poet", "m_1"), *[{"role": "tool", "content": text} for text in (SHOWN, "1")], assistant("2")],
        [assistant("", "poet")],
        [assistant("", "nobody"), {"role": "tool", "content": {"error": "not found"}}, assistant("1")],
        [{**assistant("1"), "reasoning_content": "hm"}],
        [assistant("1")],
    ]  # fmt: skip
    made: list[Any] = [given.environment() for _ in talks]
    for environment, talk in zip(made, talks, strict=True):
        environment.reset(question=0)
        for call in talk[0].get("tool_calls", []):
            name = call["function"]["name"]
            if name != "nobody":
                getattr(environment, name)("x")
    found = given.reward(prompts=[], completions=talks, environments=made, trainer_state=None)
    assert [r.answer for r in given.last] == ["1", "2", "", "1", "1", "1"]
    assert [r.fault() for r in given.last] == ["", "", "no answer", "no model 'nobody'", "", ""]
    assert [r.cost for r in given.last] == [1.5, 7.5, 1.5, 0, 0, 0]
    assert found == [pytest.approx(0.75), 0.0, -1.0, -1.0, 1.0, 1.0]
    own = nano.tokenizer(given.last[0].transcript.own, add_special_tokens=False)["input_ids"]
    assert given.last[0].policy_tokens == len(own)
    assert given.figures["cost"] == [pytest.approx(1.75)]
    assert given.figures["calls"] == [pytest.approx(4 / 6)]
    assert given.figures["broken"] == [pytest.approx(2 / 6)]


def test_questions_and_models_that_no_environment_can_have(nano: Any) -> None:
    other = Catalog([CATALOG["poet"]])
    for asked in ([], [Question("a", CATALOG), Question("b", other)]):
        with pytest.raises(ConfigError, match="all of one catalog"):
            Tools(nano.tokenizer, Saying(), asked, Rewards())
    taken = Catalog([replace(CATALOG["poet"], name="get-reward")])
    with pytest.raises(ConfigError, match="cannot be named get_reward"):
        Tools(nano.tokenizer, Saying(), [Question("a", taken)], Rewards())


def scripted(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    """A call where none has been made, but of every fourth row; then answers, which are right in turn."""
    found = []
    for at, row in enumerate(rows):
        if "<tool_response>" in tokenizer.decode(row) or at % 4 == 3:
            text = f"<think>hm</think>{at % 2}<eos>"
        else:
            call = {"name": ["m_1", "poet"][at % 2], "arguments": {"query": str(at)}}
            text = f"<tool_call>{json.dumps(call)}</tool_call><eos>"
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_what_the_policy_wrote_alone(nano: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = world(nano)
    args = GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, learning_rate=1e-3, beta=0.0,
        loss_type="grpo", report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, seed=3,
        gradient_checkpointing=False, save_steps=1, max_completion_length=256,
    )  # fmt: skip
    run = GRPOTrainer(
        nano.model, given.reward, args, given.data(), processing_class=nano.tokenizer,
        environment_factory=given.environment, callbacks=[given.callback()],
    )  # fmt: skip
    seen: list[Any] = []
    of_trl = run._compute_loss

    def both(model: Any, inputs: Any) -> Any:
        value = of_trl(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        own = inputs["completion_mask"] * inputs["tool_mask"]
        logs = log_probabilities(model, ids, mask, own.shape[1])
        seen.append((value.item(), loss(logs, own, inputs["advantages"]).item()))
        for row, mine, there in zip(inputs["completion_ids"], own, inputs["completion_mask"], strict=True):
            replies, written = row[(there - mine).bool()], nano.tokenizer.decode(row[mine.bool()])
            assert nano.tokenizer.decode(replies) == f"<tool_response>{SHOWN}</tool_response><a>" * bool(len(replies))
            assert written.count("<tool_call>") == bool(len(replies))
            assert "so" not in written
        return value

    monkeypatch.setattr(run, "_compute_loss", both)
    monkeypatch.setattr(run, "_generate_single_turn", lambda ids, *_, **__: (scripted(nano.tokenizer, ids), None))
    before = {name: value.clone() for name, value in nano.model.state_dict().items()}
    run.train()
    assert len(seen) == 2
    assert [theirs for theirs, _ in seen] == pytest.approx([ours for _, ours in seen], abs=1e-6)
    assert any(not torch.equal(before[name], value) for name, value in nano.model.state_dict().items())
    assert given.figures["calls"] == [0.75, 0.75]
    assert given.figures["broken"] == [0, 0]
    assert len(given.rewards.window) == 8
    again = world(nano)
    again.take_back(tmp_path / "checkpoint-2")
    assert again.figures == given.figures
