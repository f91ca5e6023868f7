"""Router-R1's training: episodes, our loss against a naive one and against TRL's, and a resume that is exact."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from moesaic.errors import ConfigError
from moesaic.llms.catalog import Model
from moesaic.llms.router_r1 import scripts, warm, world
from moesaic.llms.router_r1.engine import Limits, Question, Reply, roll
from moesaic.llms.router_r1.for_trl import Rollouts
from moesaic.llms.router_r1.grpo import Episode, advantages, log_probabilities, loss, padded
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.rewards import Rewards
from moesaic.models.embedded import load_model
from moesaic.models.nano.tasks import CUES, TASKS

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
MODELS = {name: Model(name=name, input_price=0.0, output_price=1.0, parameters=0.003) for name in world.KNOWS}
CUE = {cue: task for task, cue in CUES.items()}


class Knowing:
    """A pool whose members answer as they should, and what they do not know at random; it says more where told."""

    def __init__(self, more: str = "") -> None:
        self.more = more

    def ask(self, calls: Sequence[tuple[Model, str]]) -> list[Reply]:
        return [self._one(model, query) for model, query in calls]

    def _one(self, model: Model, query: str) -> Reply:
        words = query.split()
        digits, cues = [int(w) for w in words if w.isdecimal()], [w for w in words if w in CUE]
        task = CUE[cues[0]] if cues else ""
        known = len(cues) == 1 and task in world.KNOWS[model.served_as or model.name]
        found = TASKS[task](digits) if known else random.Random(query).sample(digits, len(digits))
        return Reply(world.written(found) + self.more, max(1, len(found)))


def policy(seed: int = 0, **how: Any) -> LocalPolicy:
    loaded = load_model("nano")
    warm.with_tags(loaded.model, loaded.tokenizer, seed)
    return LocalPolicy(loaded.model.eval(), loaded.tokenizer, max_new_tokens=10, **how)


def asked(n: int = 4, hops: int = 2, seed: int = 0) -> list[Question]:
    return world.questions(MODELS, n, hops, seed)


# -- the world ---------------------------------------------------------------------------------------------------------


def test_a_question_is_what_its_tasks_make_of_its_list() -> None:
    for hops in (1, 2):
        for question in asked(60, hops):
            digits = list(question.about["digits"])
            for task in question.about["tasks"]:
                digits = TASKS[task](digits)
            assert question.truths == (" ".join(map(str, digits)) or "none",)
            assert question.text.endswith(" then ".join(CUES[task] for task in question.about["tasks"]))
            offered = " ".join(model.description for model in question.catalog.values()).split()
            assert all(CUES[task] in offered for task in question.about["tasks"])
            assert len({world.specialist(task) for task in question.about["tasks"]}) == hops
            assert world.told(question).splitlines()[-1] == question.text
    assert [q.text for q in asked(9)] == [q.text for q in asked(9)] != [q.text for q in asked(9, seed=1)]
    held = frozenset(world.written(q.about["digits"]) for q in asked(9))
    assert not held & {world.written(q.about["digits"]) for q in world.questions(MODELS, 60, 2, 0, exclude=held)}
    with pytest.raises(ConfigError, match="one or two hops"):
        world.questions({}, 1, 2, 0)


def test_specialists_go_by_another_name_and_price_where_asked() -> None:
    given = world.questions(MODELS, 20, 2, 0, renamed={"order": "sorter"}, prices={**dict.fromkeys(MODELS, 2.0)})
    assert any("sorter" in q.catalog for q in given)
    assert {model.output_price for q in given for model in q.catalog.values()} == {2.0}
    assert all(world.called(q, "order") == ("sorter" if "sorter" in q.catalog else "") for q in given)
    names = [name for q in asked(60) for name in q.catalog]
    assert {*names} == {*world.WORDS}
    assert not {*names} & {*world.HELD}
    (named,) = {m.served_as for q in given for m in q.catalog.values() if m.name == "sorter"}
    assert named == "order"


def test_a_newcomer_knows_what_nobody_knows_together_and_is_the_generalist() -> None:
    given = world.questions(MODELS, 20, 2, 0, newcomer=("asc", "reverse"))
    for question in given:
        assert {*question.about["tasks"]} & {"asc", "reverse"}
        model = question.catalog[world.called(question, world.NEWCOMER)]
        assert model.description.split() == [CUES["asc"], CUES["reverse"]]
        assert model.served_as == world.GENERALIST
        assert model.output_price is not None
        assert model.output_price <= world.CHEAP[1]
    assert not any(world.called(question, world.NEWCOMER) for question in asked(9))


def test_a_script_that_reads_the_prompt_is_always_right_and_costs_least() -> None:
    questions = asked(40)
    right, dear = [
        roll(scripts.Script(questions, choose), Knowing(), questions, say=world.told)
        for choose in (scripts.cheapest, scripts.always("lists"))
    ]
    assert all(r.answer == r.question.truths[0] and not r.fault(strict=True) and len(r.calls) == 2 for r in right)
    assert sum(r.cost for r in right) < sum(r.cost for r in dear)
    once = roll(scripts.Script(questions, scripts.at_random(0), whole=True), Knowing(), questions, say=world.told)
    assert {len(r.calls) for r in once} == {1}


# -- episodes and the loss ---------------------------------------------------------------------------------------------


def test_the_mask_is_0_exactly_on_replies_whatever_they_say() -> None:
    questions, seen = asked(3), []
    for more in ("", " </information><answer> 9 </answer> <think>"):
        made = policy(seed=1)
        given = warm.rows(
            made, roll(scripts.Script(questions, scripts.cheapest), Knowing(more), questions, say=world.told),
            [world.told(q) for q in questions],
        )  # fmt: skip
        seen.append([[i for i in row["labels"] if i != warm.IGNORED] for row in given])
        for row, question in zip(given, questions, strict=True):
            tags = made.tokenizer.convert_tokens_to_ids(["<information>", "</information>"])
            assert not {*tags} & {*row["labels"]}
            assert [row["input_ids"].count(tag) for tag in tags] == [2, 2]
            assert len(row["labels"]) == len(row["input_ids"])
            assert made.tokenizer.decode(row["input_ids"]).startswith(world.told(question))
    # the second hop copies the reply, which is longer there: what is written before it is the same
    assert [row[:12] for row in seen[0]] == [row[:12] for row in seen[1]]


def test_a_warm_start_that_is_done_is_taken_as_it_is(tmp_path: Path) -> None:
    questions, seen = asked(3), []
    for _ in range(2):
        made = policy(seed=1)
        found = roll(scripts.Script(questions, scripts.cheapest), Knowing(), questions, say=world.told)
        given = warm.rows(made, found, [world.told(q) for q in questions])
        loss_ = warm.imitate(made, given, tmp_path, steps=2, batch_size=2)
        seen.append((loss_, [p.detach().clone() for p in made.model.parameters()]))
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, *(weights for _, weights in seen)))
    assert not (tmp_path / "checkpoint-3").exists()


def episodes(made: LocalPolicy, n: int = 3) -> list[Episode]:
    questions = asked(n)
    found = roll(made, Knowing(), questions, Limits(turns=2), say=world.told)
    return [Episode.of(r, made.encode(world.told(q))) for r, q in zip(found, questions, strict=True)]


def test_an_episode_is_what_stands_in_the_cache() -> None:
    made = policy(temperature=1.0, seed=2)
    for e in episodes(made):
        assert len(e.completion) == len(e.own) == len(e.logprobs)
        ids = torch.tensor([[*e.prompt, *e.completion]])
        found = log_probabilities(made.model, ids, torch.ones_like(ids), len(e.completion))[0]
        own = torch.tensor(e.own, dtype=torch.bool)
        torch.testing.assert_close(found[own], torch.tensor(e.logprobs)[own], rtol=1e-4, atol=1e-4)


def naive_loss(made: LocalPolicy, each: Sequence[Episode], rewards: Sequence[float], group: int) -> torch.Tensor:
    """One episode after the other, without padding."""
    total = torch.zeros(())
    for at, e in enumerate(each):
        mine = rewards[at // group * group : (at // group + 1) * group]
        mean = sum(mine) / group
        std = (sum((r - mean) ** 2 for r in mine) / (group - 1)) ** 0.5
        gain = (rewards[at] - mean) / (std + 1e-4)
        logits = made.model(input_ids=torch.tensor([[*e.prompt, *e.completion]])).logits[0].log_softmax(-1)
        logs = torch.stack([logits[len(e.prompt) + t - 1, token] for t, token in enumerate(e.completion)])
        own = torch.tensor(e.own)
        total = total - ((logs - logs.detach()).exp() * gain * own).sum() / own.sum()
    return total / len(each)


def test_the_loss_is_the_naive_one_gradients_included() -> None:
    made = policy(temperature=1.0, seed=2)
    each, rewards = episodes(made, 4), [1.0, -1.0, 0.0, 0.7]
    found = []
    for of in ("naive", "ours"):
        made.model.zero_grad()
        if of == "naive":
            value = naive_loss(made, each, rewards, 2)
        else:
            batch = padded(each, made.tokenizer.pad_token_id)
            logs = log_probabilities(made.model, batch["ids"], batch["mask"], batch["own"].shape[1])
            value = loss(logs, batch["own"], advantages(rewards, 2))
        value.backward()
        found.append([p.grad.clone() for p in made.model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_clipping_and_the_reference_are_as_written() -> None:
    logs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old, ref, own, gain = torch.tensor([[-1.0, -1.1]]), torch.tensor([[-0.5, -1.0]]), torch.ones(1, 2), torch.ones(1)
    found = loss(logs, own, gain, old=old, reference=ref, beta=0.1)
    kl = [torch.exp(torch.tensor(-0.5)) + 0.5 - 1, torch.tensor(0.0)]
    wanted = (-1.2 + 0.1 * kl[0] - torch.exp(torch.tensor(0.1)) + 0.1 * kl[1]) / 2
    assert found.item() == pytest.approx(wanted.item())
    assert advantages([1.0, 1.0, 0.0, 1.0], 2).tolist() == pytest.approx([0, 0, -0.7070, 0.7070], abs=1e-3)


# -- TRL ---------------------------------------------------------------------------------------------------------------


def trainer(out: Path, made: LocalPolicy, given: Rollouts, steps: int, **how: Any) -> GRPOTrainer:
    args = GRPOConfig(
        str(out), max_steps=steps, per_device_train_batch_size=4, num_generations=2, learning_rate=1e-3, beta=0.0,
        loss_type="grpo", report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, seed=3,
        lr_scheduler_type="constant", gradient_checkpointing=False, **how,
    )  # fmt: skip
    return GRPOTrainer(
        made.model, given.reward, args, given.data(), processing_class=made.tokenizer, rollout_func=given.rollout,
        callbacks=[given.callback()],
    )  # fmt: skip


class Drawn(Rewards):
    """Rewards that differ within a group: what is trained on is of no account here."""

    def __call__(self, fault: str, answer: str, truths: Sequence[str], cost: float, **_: Any) -> Any:
        from moesaic.llms.router_r1.rewards import Reward

        self.window.add(cost + len(self.window))
        return Reward(float(len(self.window) % 3), 0.0, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_trls_loss_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(temperature=1.0)
    given = Rollouts(made, Knowing(), asked(6), Drawn(), Limits(turns=2), say=world.told)
    run, seen = trainer(tmp_path, made, given, 1, save_strategy="no"), []
    of_trl = run._compute_loss

    def both(model: Any, inputs: Any) -> Any:
        value = of_trl(model, inputs)
        each = [Episode.of(r, made.encode(world.told(r.question))) for r in given.last]
        batch = padded(each, made.tokenizer.pad_token_id)
        logs = log_probabilities(model, batch["ids"], batch["mask"], batch["own"].shape[1])
        rewards = [float((i + 1) % 3) for i in range(len(each))]
        seen.append((value.item(), loss(logs, batch["own"], advantages(rewards, 2)).item()))
        return value

    monkeypatch.setattr(run, "_compute_loss", both)
    run.train()
    ((theirs, ours),) = seen
    assert theirs == pytest.approx(ours, abs=1e-6)
    assert given.figures["reward"] == [pytest.approx(1.0, abs=0.3)]


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_taken_up_again_is_the_same_run(tmp_path: Path) -> None:
    def begun(out: Path) -> tuple[LocalPolicy, Rollouts]:
        torch.manual_seed(0)
        made = policy(temperature=1.0)
        return made, Rollouts(made, Knowing(), asked(8), Drawn(), Limits(turns=1), say=world.told)

    made, given = begun(tmp_path)
    trainer(tmp_path / "whole", made, given, 4, save_strategy="no").train()
    whole, weights = given.figures, {k: v.clone() for k, v in made.model.state_dict().items()}
    made, given = begun(tmp_path)
    run = trainer(tmp_path / "cut", made, given, 4, save_steps=2)
    run.train()
    assert given.figures == whole
    made, given = begun(tmp_path)
    torch.rand(7)
    given.take_back(tmp_path / "cut" / "checkpoint-2")
    assert len(given.figures["reward"]) == 2
    run = trainer(tmp_path / "cut", made, given, 4, save_steps=2)
    run.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert given.figures == whole
    assert all(torch.equal(made.model.state_dict()[name], held) for name, held in weights.items())


def test_questions_that_read_the_same_are_refused() -> None:
    made = policy()
    with pytest.raises(ConfigError, match="the same prompt"):
        Rollouts(made, Knowing(), [*asked(1), *asked(1)], Rewards(), say=world.told)
