"""Recorded outcomes: what every model scored, and cost, on every prompt; and the files in which they are published.

All that is computed from such a table is *replayed*: nothing was asked while it was computed.

    format        file                                   holds
    jsonl         our own: {"prompt", "category"?, "scores": {model: 0..1}, "costs"?: {model: USD}} a line
    csv           our own: prompt, category?, a column a model, and MODEL|cost (USD); RouteLLM's and RouterBench's too
    llmrouter     train.json, test.json of LLMRouter beside its default_query_*.jsonl, which name the tasks
    mt_bench      RouteLLM's mt_bench_scores.csv beside its mt_bench_question.jsonl
    routerarena   RouterArena's outcomes, a line a prompt: for evaluation only
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.data.files import read_rows
from moesaic.data.jsonl import decode, encodable
from moesaic.errors import DataError, first_line, path_of, suggest
from moesaic.llms.catalog import Catalog

Floats = NDArray[np.float64]

_CATEGORY = ("category", "subject", "eval_name")
"""Columns that name a prompt's category: ours, RouteLLM's, RouterBench's."""
_COST = ("|cost", "|total_cost")
"""What a model's column of costs ends with: ours, RouterBench's."""
_OTHER = ("_response", "|model_response", "sample_id", "oracle_model_to_route_to")
"""Ends of columns that are neither."""
_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Table:
    """Scores of M models on N prompts.

    Attributes:
        prompts: N texts. categories: N names, empty texts where none is known.
        models: M names, as a catalog has them.
        scores: (N, M), 0 to 1. costs: (N, M) USD; None where none was recorded.
        source: where it was read. evaluation_only: nothing may be fitted to it.
    """

    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    models: tuple[str, ...]
    scores: Floats
    costs: Floats | None = None
    source: str = ""
    evaluation_only: bool = False

    def __post_init__(self) -> None:
        shape = (len(self.prompts), len(self.models))
        if not self.prompts or not self.models:
            raise DataError(f"{self.source or 'a table'} holds no prompts or no models")
        if len(self.categories) != shape[0] or len(set(self.models)) != shape[1]:
            raise DataError(f"{self.source or 'a table'}: a category a prompt, and each model once")
        for name, held in (("scores", self.scores), ("costs", self.costs)):
            if held is not None and (held.shape != shape or not np.isfinite(held).all() or (held < 0).any()):
                raise DataError(f"{self.source or 'a table'}: {name} must be {shape[0]} x {shape[1]} numbers from 0 on")
        if (self.scores > 1).any():
            raise DataError(f"{self.source or 'a table'}: a score lies above 1")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Table:
        """Some of its prompts."""
        at = np.arange(len(self))[np.asarray(index)]
        return Table(
            tuple(self.prompts[i] for i in at), tuple(self.categories[i] for i in at), self.models, self.scores[at],
            None if self.costs is None else self.costs[at], self.source, self.evaluation_only,
        )  # fmt: skip


@dataclass
class _Rows:
    """A table as it grows, a prompt at a time; every prompt has the models of the first."""

    prompts: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    costs: list[list[float]] = field(default_factory=list)
    models: tuple[str, ...] = ()

    def add(self, where: str, prompt: Any, category: Any, scores: Any, costs: Any = None) -> None:
        """Raises DataError, which opens with `where`, for what no row can hold."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: its prompt is missing or no text")
        if not isinstance(category, str):
            raise DataError(f"{where}: its category is no text")
        if not isinstance(scores, Mapping) or not scores:
            raise DataError(f"{where}: it has no scores by model")
        self.models = self.models or tuple(scores)
        if self.prompts and bool(self.costs) != (costs is not None):
            raise DataError(f"{where}: costs are there for every prompt or for none")
        self.scores.append(self._numbers(where, "score", scores, 1.0))
        if costs is not None:
            self.costs.append(self._numbers(where, "cost", costs, np.inf))
        self.prompts.append(encodable(prompt, "prompt", where))
        self.categories.append(encodable(category, "category", where))

    def _numbers(self, where: str, what: str, found: Any, most: float) -> list[float]:
        if not isinstance(found, Mapping) or found.keys() != set(self.models):
            named = set(found) if isinstance(found, Mapping) else set()
            other = min(map(str, named ^ set(self.models)), default="")
            raise DataError(f"{where}: a {what} for each of the first row's models, once; see {other[:80]!r}")
        return [_number(f"{where}: the {what} of {model[:80]!r}", found[model], most) for model in self.models]

    def table(self, source: str, evaluation_only: bool = False) -> Table:
        """With its models by name, so that the parts of one data set agree in their columns."""
        order = sorted(range(len(self.models)), key=self.models.__getitem__)
        scores = np.array(self.scores, float)[:, order]
        costs = np.array(self.costs, float)[:, order] if self.costs else None
        prompts, categories, models = tuple(self.prompts), tuple(self.categories), tuple(sorted(self.models))
        return Table(prompts, categories, models, scores, costs, source, evaluation_only)


def _number(what: str, value: Any, most: float) -> float:
    """A number from 0 to `most`; a text is read as one, true and false as 1 and 0."""
    try:
        number = _TRUTH[value.lower()] if isinstance(value, str) and value.lower() in _TRUTH else float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{what} is no number: {str(value)[:40]!r}") from None
    if not 0 <= number <= most or number == np.inf:
        raise DataError(f"{what} is {number}, not {'0 to 1' if most == 1 else 'a number from 0 on'}")
    return number


def read_table(path: str | Path, format: str | None = None) -> Table:
    """Recorded outcomes out of a file.

    Args:
        format: one of `FORMATS`; told by the first row where None.
    Raises:
        DataError: the file or one beside it is missing or damaged; names file and row.
    """
    file = path_of(path)
    if not file.is_file():
        raise DataError(f"no such file: {file}")
    if format is not None and format not in FORMATS:
        raise DataError(f"no format '{format}' of tables; {suggest(format, FORMATS)}")
    return FORMATS[format or _told(file)](file)


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row behind its place. Raises DataError for one that is no object, and for a file without any."""
    row = None
    for where, text in read_rows(file):
        row = decode(text, where)
        if not isinstance(row, dict):
            raise DataError(f"{where}: it is no object")
        yield where, row
    if row is None:
        raise DataError(f"{file} holds no rows")


def _told(file: Path) -> str:
    """The format, by what the first row has."""
    (where, first), *_ = islice(_objects(file), 1)
    if file.suffix == ".csv":
        return "mt_bench" if {"question_id", "turn", "score"} <= first.keys() else "csv"
    marks = {"jsonl": {"prompt", "scores"}, "llmrouter": {"question", "scores"}, "routerarena": {"question", "models"}}
    for name, keys in marks.items():
        if keys <= first.keys():
            return name
    if {"prompt", "model", "score"} <= first.keys():
        raise DataError(f"{where}: a log, where not every model saw every prompt; a table of all scores is needed")
    raise DataError(f'{where}: neither {{"prompt", "scores"}} nor a row of llmrouter, routerarena: say its format')


def _jsonl(file: Path) -> Table:
    rows = _Rows()
    for where, row in _objects(file):
        if unknown := row.keys() - {"prompt", "category", "scores", "costs"}:
            known = suggest(min(unknown), ("prompt", "category", "scores", "costs"))
            raise DataError(f"{where}: unknown {min(unknown)[:80]!r}; {known}")
        rows.add(where, row.get("prompt"), row.get("category", ""), row.get("scores"), row.get("costs"))
    return rows.table(str(file))


def _csv(file: Path) -> Table:
    """A column a model. RouteLLM's and RouterBench's names of the others are known, and their texts left out."""
    rows = _Rows()
    for where, row in _objects(file):
        category = next((row[name] for name in _CATEGORY if name in row), "")
        cells = {k: v for k, v in row.items() if k not in ("prompt", *_CATEGORY) and not k.endswith(_OTHER)}
        costs = {k.rpartition("|")[0]: v for k, v in cells.items() if k.endswith(_COST)}
        scores = {k: v for k, v in cells.items() if not k.endswith(_COST)}
        rows.add(where, row.get("prompt"), category, scores, costs or None)
    return rows.table(str(file))


def _llmrouter(file: Path) -> Table:
    """Scores by question; its task is that of the same text in default_query_*.jsonl, the first where several are."""
    beside = file.with_name(f"default_query_{file.stem}.jsonl")
    if not beside.is_file():
        raise DataError(f"{file} needs {beside.name} beside it, which names the tasks")
    tasks: dict[str, Any] = {}
    for where, row in _objects(beside):
        if not isinstance(row.get("query"), str) or "task_name" not in row:
            raise DataError(f"{where}: query or task_name is missing")
        tasks.setdefault(row["query"], row["task_name"])
    rows = _Rows()
    for where, row in _objects(file):
        question = row.get("question")
        if not isinstance(question, str) or question not in tasks:
            raise DataError(f"{where}: its question is not in {beside.name}, which names the tasks")
        rows.add(where, question, tasks[question], row.get("scores"))
    return rows.table(str(file))


def _mt_bench(file: Path) -> Table:
    """A judge's 1 to 10, as tenths; the prompt of a second turn is both turns, an empty line between."""
    beside = file.with_name("mt_bench_question.jsonl")
    if not beside.is_file():
        raise DataError(f"{file} needs {beside.name} beside it, which holds the prompts")
    asked = {str(row.get("question_id")): row for _, row in _objects(beside)}
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for where, row in _objects(file):
        if missing := {"question_id", "turn", "model", "score"} - row.keys():
            raise DataError(f"{where}: {min(missing)} is missing")
        question, turn, model = (str(row[name]) for name in ("question_id", "turn", "model"))
        turns = asked.get(question, {}).get("turns")
        if turn not in ("1", "2") or not isinstance(turns, list) or len(turns) < int(turn):
            raise DataError(f"{where}: question {question[:40]!r}, turn {turn[:40]!r} is not in {beside.name}")
        of = scores.setdefault((question, turn), {})
        if model in of:
            raise DataError(f"{where}: {model[:80]!r} has two scores for one turn")
        judged = _number(f"{where}: the score of {model[:80]!r}", row["score"], np.inf)
        of[model] = _number(f"{where}: a tenth of the score of {model[:80]!r}", judged / 10, 1.0)
    rows = _Rows()
    for (question, turn), of in scores.items():
        found = asked[question]
        prompt = "\n\n".join(map(str, found["turns"][: int(turn)]))
        rows.add(f"{file}: question {question}, turn {turn}", prompt, found.get("category", ""), of)
    return rows.table(str(file))


def _routerarena(file: Path) -> Table:
    """Scores and USD; the category is the data set that a prompt is of. METEOR below 0 counts as 0."""
    rows = _Rows()
    for where, row in _objects(file):
        models, index = row.get("models"), row.get("global_index")
        if not isinstance(models, dict) or not all(isinstance(of, dict) for of in models.values()):
            raise DataError(f"{where}: its models are no object of objects")
        if not isinstance(index, str) or "_" not in index:
            raise DataError(f"{where}: its global_index is no text that ends with _NUMBER")
        if missing := [name for name, of in models.items() if not {"score", "cost"} <= of.keys()]:
            raise DataError(f"{where}: score or cost of {missing[0][:80]!r} is missing")
        signed = {name: of["score"] for name, of in models.items()}
        scores = {name: 0.0 if isinstance(s, float) and -1 <= s < 0 else s for name, s in signed.items()}
        costs = {name: of["cost"] for name, of in models.items()}
        rows.add(where, row.get("question"), index.rpartition("_")[0], scores, costs)
    return rows.table(str(file), evaluation_only=True)


FORMATS: dict[str, Callable[[Path], Table]] = {
    "jsonl": _jsonl, "csv": _csv, "routellm": _csv, "routerbench": _csv, "llmrouter": _llmrouter,
    "mt_bench": _mt_bench, "routerarena": _routerarena,
}  # fmt: skip


def llmrouter_catalog(path: str | Path) -> Catalog:
    """LLMRouter's default_llm.json, or the folder that it is in: sizes are nominal, prices USD a million tokens.

    Raises:
        DataError: the file is missing or damaged, or a size is none. ConfigError: a price is.
    """
    file = path_of(path)
    file = file / "default_llm.json" if file.is_dir() else file
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    stored = decode(text, str(file))
    if not isinstance(stored, dict) or not all(isinstance(of, dict) for of in stored.values()):
        raise DataError(f"{file}: it is no object with an object for each model")
    return Catalog.of(
        [
            {
                "name": name, "served_as": of.get("model", ""), "input_price": of.get("input_price"),
                "output_price": of.get("output_price"), "parameters": _billions(of.get("size"), f"{file}: {name[:80]}"),
                "description": of.get("feature", ""),
            }
            for name, of in stored.items()
        ],
        str(file),
    )  # fmt: skip


def _billions(size: Any, where: str) -> float:
    """Of 7B or 135M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([BM])", size.strip()) if isinstance(size, str) else None
    if found is None:
        raise DataError(f"{where}: its size is no number of B or M: {str(size)[:40]!r}")
    return float(found[1]) / (1 if found[2] == "B" else 1000)
