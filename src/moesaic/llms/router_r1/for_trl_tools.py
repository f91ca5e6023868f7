"""Router-R1 in TRL's GRPOTrainer by tool calls: an environment whose tools are the models of a catalog.

    world = Tools(tokenizer, pool, questions, Rewards(alpha=0.6))
    trainer = GRPOTrainer(model, world.reward, args, world.data(), processing_class=tokenizer,
                          environment_factory=world.environment, callbacks=[world.callback()])

TRL generates, reads the calls, renders the replies and leaves them out of the loss, all by the tokenizer's chat
template and `response_template`, which must know tools (Qwen's does). Conversations are judged as the call dialect's
transcripts are. TRL says that environments may change; all that is known of them stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from moesaic.errors import ConfigError
from moesaic.llms.router_r1.calls import QUERY, Calls, functions, tools, written
from moesaic.llms.router_r1.engine import Limits, Pool, Question, Reply, Rollout, Written, called, plainly, refused
from moesaic.llms.router_r1.for_trl import Rewarded
from moesaic.llms.router_r1.local import clipped
from moesaic.llms.router_r1.rewards import Rewards
from moesaic.llms.router_r1.transcript import NOTHING, Piece, Search, Transcript

DIALECT = Calls(listed=False)
_TAKEN = ("reset", "get_reward")
"""What TRL calls on an environment itself."""


class Tools(Rewarded):
    """Questions, whom they are put to, and what answers are worth, as TRL takes them with tools.

    Attributes:
        environment: the class of environments, with a tool for each model, named as its function is.
    """

    def __init__(
        self,
        tokenizer: Any,
        pool: Pool,
        questions: Sequence[Question],
        rewards: Rewards,
        limits: Limits | None = None,
        *,
        say: Callable[[Question], str] | None = None,
    ) -> None:
        """
        Args:
            limits: `turns` are calls here, however many a generation makes.
            say: what the policy is asked; `plainly` where None, without the tools, which the chat template tells.
        Raises:
            ConfigError: questions of different catalogs, or none; models whose functions cannot be told apart, or
                would be named as what TRL calls itself.
        """
        super().__init__(rewards)
        if not questions or any(dict(question.catalog) != dict(questions[0].catalog) for question in questions):
            raise ConfigError("an environment needs questions, all of one catalog: its tools are the same for all")
        models = list(questions[0].catalog.values())
        if taken := {*functions(models)} & {*_TAKEN}:
            raise ConfigError(f"a model's function cannot be named {min(taken)}, which TRL calls itself: rename it")
        self.tokenizer, self.pool, self.questions = tokenizer, pool, list(questions)
        self.limits, self._say = limits or Limits(), say or partial(plainly, dialect=DIALECT)
        methods = {tool["function"]["name"]: _method(**tool["function"]) for tool in tools(models)}
        self.environment: type[_Environment] = type("Environment", (_Environment,), {"_world": self, **methods})

    def data(self) -> Any:
        """A data set of prompts, each with its question's number."""
        from datasets import Dataset

        prompts = [[{"role": "user", "content": self._say(question)}] for question in self.questions]
        return Dataset.from_dict({"prompt": prompts, "question": list(range(len(prompts)))})

    def reward(self, prompts: Any, completions: Sequence[Any], environments: Sequence[Any], **_: Any) -> list[float]:
        """The reward function: the answer is the completion's, the cost that of the environment's calls."""
        return self.worth([e._told(completion) for e, completion in zip(environments, completions, strict=True)])


class _Environment:
    """One conversation. What begins with `_` is no tool to TRL."""

    _world: ClassVar[Tools]
    _rollout: Rollout

    def reset(self, question: int, **_: Any) -> None:
        self._rollout = Rollout(self._world.questions[question], Transcript(dialect=DIALECT))

    def _ask(self, name: str, query: object) -> str:
        """What a model is read to reply; the word for nothing where it is not asked, or fails."""
        world, calls, catalog = self._world, self._rollout.calls, self._rollout.question.catalog
        search = Search(name, query.strip() if isinstance(query, str) else "")
        model = DIALECT.resolve(name, catalog)
        why = refused(model, search, self._rollout.cost, world.limits)
        if len(calls) >= world.limits.turns:
            why = "no turn is left for it"
        if why or model is None:
            reply = Reply("", failure=why)
        else:
            (reply,) = world.pool.ask([(model, search.query)])
        text = NOTHING if reply.failure else clipped(world.tokenizer, reply.text, world.limits.reply_tokens)
        calls.append(called(search, model, reply, text, asked=not why))
        return DIALECT.harmless(text)

    def _told(self, completion: Sequence[dict[str, Any]]) -> Rollout:
        """The rollout, with what was said, which TRL keeps as messages; the policy's tokens are counted anew."""
        found = self._rollout
        for message in completion:
            if message["role"] == "tool":
                found.transcript.pieces.append(Piece(str(message["content"]), reply=True))
                continue
            text = written(message, DIALECT)
            found.transcript.pieces.append(Piece(text))
            found.written.append(Written(text, len(self._world.tokenizer(text, add_special_tokens=False)["input_ids"])))
        return found


def _method(name: str, description: str, parameters: object) -> Callable[..., str]:
    """A tool as TRL reads it: by its name, its type hints and its docstring."""

    def ask(self, query: str) -> str:  # a hint of `self` would be an argument to TRL
        return str(self._ask(name, query))

    told = " ".join(description.split())
    ask.__name__ = ask.__qualname__ = name
    ask.__doc__ = f"{told}\n\nArgs:\n    query: {QUERY}\n\nReturns:\n    What it replies.\n"
    return ask
