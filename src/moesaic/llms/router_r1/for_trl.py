"""Router-R1 in TRL's GRPOTrainer: transcripts as `rollout_func` and `env_mask`, rewards, and a resume that is exact.

    world = Rollouts(policy, pool, questions, Rewards(alpha=0.6))
    trainer = GRPOTrainer(model, world.reward, args, world.data(), processing_class=tokenizer,
                          rollout_func=world.rollout, callbacks=[world.callback()])

TRL says that `rollout_func` may change; all that is known of it stands here. `for_trl_tools` is the other way in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError
from moesaic.llms.router_r1.engine import Limits, Pool, Question, Rollout, plainly, roll
from moesaic.llms.router_r1.grpo import Episode
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.rewards import CostWindow, Rewards
from moesaic.runs.folder import read_json, write_json

WINDOW = "cost_window.json"


class Rewarded:
    """What batches were worth, as training goes on.

    Attributes:
        rewards: whose window of costs is of training alone. last: the rollouts of the latest batch.
        figures: by name, means over each batch so far: reward, outcome, cost, calls, broken, tokens.
        tried: tries on others.
    """

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards
        self.last: list[Rollout] = []
        self.figures: dict[str, list[float]] = {}
        self.tried: list[dict[str, Any]] = []

    def worth(self, found: list[Rollout]) -> list[float]:
        """The rewards of a batch, which is noted."""
        worth = [
            self.rewards(r.fault(), r.answer, r.question.truths, r.cost, alpha=r.question.alpha, failed=r.failed)
            for r in found
        ]
        self.last = found
        means: dict[str, Sequence[float]] = {
            "reward": [w.total for w in worth], "outcome": [w.outcome for w in worth],
            "cost": [r.cost for r in found], "calls": [len(r.calls) for r in found],
            "broken": [bool(w.fault) for w in worth], "tokens": [r.policy_tokens for r in found],
        }  # fmt: skip
        for name, values in means.items():
            self.figures.setdefault(name, []).append(statistics.fmean(values))
        return [w.total for w in worth]

    def callback(self) -> Any:
        """Keeps the window of costs and the figures with TRL's checkpoints, and takes them back."""
        from transformers import TrainerCallback

        rewarded = self

        class Keeping(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                window = rewarded.rewards.window.state()
                write_json(place / WINDOW, {"window": window, "figures": rewarded.figures, "tried": rewarded.tried})

        return Keeping()

    def take_back(self, checkpoint: str | Path) -> None:
        """The window, figures and tries as they were at a checkpoint. Raises ConfigError where they are not."""
        stored = read_json(Path(checkpoint) / WINDOW)
        self.rewards.window = CostWindow(**stored["window"])
        self.figures, self.tried = stored["figures"], stored["tried"]


class Rollouts(Rewarded):
    """Questions, whom they are put to, and what answers are worth, as TRL takes them."""

    def __init__(
        self,
        policy: LocalPolicy,
        pool: Pool,
        questions: Sequence[Question],
        rewards: Rewards,
        limits: Limits | None = None,
        *,
        say: Callable[[Question], str] | None = None,
    ) -> None:
        """Raises ConfigError for two questions whose prompts are the same."""
        super().__init__(rewards)
        self.policy, self.pool, self.limits = policy, pool, limits
        self.say = say or partial(plainly, dialect=policy.dialect)
        self._questions = {self.say(question): question for question in questions}
        if len(self._questions) < len(questions):
            raise ConfigError("two questions have the same prompt: TRL tells them apart by it")

    def data(self) -> Any:
        """A data set of prompts."""
        from datasets import Dataset

        return Dataset.from_dict({"prompt": list(self._questions)})

    def rollout(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """What TRL asks of a `rollout_func`: one transcript a prompt, which comes as often as it has generations."""
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            asked, dialect = [self._questions[prompt] for prompt in prompts], self.policy.dialect
            found = roll(self.policy, self.pool, asked, self.limits, dialect=dialect, say=self.say)
        finally:
            self.policy.model.train(was_training)
        episodes = [Episode.of(r, self.policy.encode(p)) for r, p in zip(found, prompts, strict=True)]
        return {
            "prompt_ids": [list(e.prompt) for e in episodes],
            "completion_ids": [list(e.completion) for e in episodes],
            "logprobs": [list(e.logprobs) for e in episodes],
            "env_mask": [list(e.own) for e in episodes],
            "worth": self.worth(found),
        }

    def reward(self, prompts: Any, completions: Any, worth: Sequence[float], **_: Any) -> list[float | None]:
        """The reward function: what each transcript was worth, whatever its text reads like."""
        return list(worth)
