"""The prompt of a policy: how to think, whom it may ask and what is known of them, and the question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moesaic.llms.catalog import Model

FIELDS = ("size", "price", "latency", "context", "examples", "prose")
"""What can be told of a model."""

_TASK = """Answer the question at the end. You may ask other language models, and you see what they reply.
Whenever you have learned something, think about it first, between <think> and </think>.
Where you lack knowledge, say why, choose the model that suits best, and ask it: <search> LLM-Name:Your-Query </search>.
Its reply comes between <information> and </information>. You may ask several models, and one more than once.
- LLM-Name must be one of: [{names}], written exactly so.
- Your-Query must be a question that can be answered by itself, in your own words, without a colon.
- Never write LLM-Name or Your-Query themselves, and never repeat what is said of the models below.
When you know enough, write the answer alone, in few words, between <answer> and </answer>: <answer> Beijing </answer>.
"""
_COST = "What you spend on replies counts {alpha:g}, from 0 (not at all) to 1 (as much as being right).\n"
_HELPER = """Answer this question, or give what you know that helps to answer it, in fewer than {words} words. Where you
know nothing of it, say so and advise to ask another model.

{query}"""
REPLY_WORDS = 350


def described(model: Model, tell: Iterable[str] = FIELDS) -> str:
    """A line about a model: of its figures those that are known and that `tell` names.

    Args:
        tell: some of `FIELDS`. prose alone is what the released prompt has.
    """
    known: Mapping[str, str] = {
        "size": f"{model.parameters:g} billion parameters" if model.parameters else "",
        "price": f"${model.output_price:g} a million tokens of reply" if model.output_price is not None else "",
        "latency": f"{model.latency:g} s to the first token" if model.latency else "",
        "context": f"{model.context} tokens of context" if model.context else "",
        "examples": ", ".join(f"{name} {score:.0%}" for name, score in model.examples.items()),
        "prose": model.description.strip(),
    }
    told = [known[name] for name in tell if known[name]]
    return f"{model.name}: {'; '.join(told)}" if told else model.name


def prompt(question: str, models: Iterable[Model], tell: Iterable[str] = FIELDS, *, alpha: float | None = None) -> str:
    """What a policy is asked, as one user turn. alpha: how much cost matters, where it is to be told."""
    models, tell = list(models), list(tell)
    names = ", ".join(model.name for model in models)
    known = "\n".join(described(model, tell) for model in models)
    return f"{_TASK.format(names=names)}{weighed(alpha)}\nThe models:\n{known}\n\nQuestion: {question.strip()}\n"


def weighed(alpha: float | None) -> str:
    """The line that says how much cost matters, 0 to 1; none where nobody says."""
    return "" if alpha is None else _COST.format(alpha=alpha)


def helper(query: str, words: int = REPLY_WORDS) -> str:
    """What a model of the pool is asked, as one user turn."""
    return _HELPER.format(words=words, query=query)
