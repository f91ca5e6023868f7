"""From a recipe and rows to a model that can be trained or evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from moesaic.data import examples as data
from moesaic.errors import ConfigError, MissingDependency
from moesaic.models.embedded import LoadedModel, load_model
from moesaic.models.encoder import EncoderCollator, Layout
from moesaic.models.precision import numerics
from moesaic.runs.method import is_routed
from moesaic.runs.recipe import Recipe, adapter_config
from moesaic.training.budget import recipe_matched
from moesaic.training.wrapping import config_for, hollow, outline, with_heads, wrap


@dataclass
class Prepared:
    """A model ready to train or to evaluate, and what belongs to it. `tasks` gives a task its id by position."""

    model: Any
    base: LoadedModel
    tasks: tuple[str, ...]
    layout: Layout | None
    recipe: Recipe

    @property
    def max_length(self) -> int:
        """Tokens a row: the recipe's, or as many as the model has positions."""
        positions = self.base.positions
        return self.recipe.max_length if positions is None else min(self.recipe.max_length, positions)

    def given(self, examples: Sequence[data.Example]) -> list[data.Example]:
        """Rows as the model is given them: a language model's in its chat template, as the recipe's `prompts` says."""
        prompts = self.recipe.prompts
        if self.layout is not None:
            if prompts == "chat":
                raise ConfigError(f"prompts=chat, but {self.recipe.model} is an encoder, which has no chat template")
            return list(examples)
        from moesaic.data.causal import as_chat, writes_turns

        if prompts == "plain" or (prompts == "auto" and not writes_turns(self.base.tokenizer)):
            return list(examples)
        return [as_chat(example) for example in examples]

    @property
    def device(self) -> Any:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def routed(self) -> bool:
        return is_routed(self.recipe.method)


def require_extras() -> None:
    """Raise MissingDependency where the `train` extra is not installed."""
    for package in ("trl", "datasets", "accelerate"):
        if find_spec(package) is None:
            raise MissingDependency(package, "train")


def load_examples(recipe: Recipe) -> list[data.Example]:
    """The training rows of a recipe."""
    if not recipe.data:
        raise ConfigError("data is missing: data=FILE.jsonl, a folder of tasks, or a hub id")
    return data.load(recipe.data, "train", tasks=recipe.tasks, on_bad_lines=recipe.on_bad_lines)  # type: ignore[arg-type]


def prepare(recipe: Recipe, examples: list[data.Example]) -> Prepared:
    """Load the base model, put heads on an encoder, wrap it with the recipe's adapter (its rank solved, if asked)."""
    from transformers import set_seed

    config = config_for(recipe, sorted({e.task for e in examples}))
    plan = numerics(recipe.precision)
    loaded = load_model(recipe.model, dtype=plan.weights, attention=plan.attention)
    set_seed(recipe.seed)
    base = with_heads(loaded, examples, recipe, config)
    if recipe.match:
        recipe = recipe_matched(recipe, base)
    return Prepared(wrap(base, recipe), loaded, base.tasks, base.layout, recipe)


def planned(recipe: Recipe) -> tuple[Recipe, Any]:
    """The recipe as it would be trained, its rank solved if asked, and its model without storage: nothing is loaded."""
    base = outline(recipe, load_examples(recipe), adapter_config(recipe))
    recipe = recipe_matched(recipe, base) if recipe.match else recipe
    return recipe, hollow(base, recipe)


def size_told(recipe: Recipe, model: Any) -> str:
    """One line where the adapter is several times as large as a plain LoRA, and nobody asked for its size."""
    if not is_routed(recipe.method) or recipe.match:
        return ""
    from moesaic.lora.size import told

    said = told(model, model.peft_config["default"])
    return said and f"{said}; match=lora makes it as large as that recipe's"


def training_rows(prepared: Prepared, examples: list[data.Example]) -> list[Any]:
    """What the collator is given: an encoder's examples as they are, a causal model's as tokens.

    Raises:
        DataError, ConfigError: rows that this model cannot be trained on.
    """
    tokenizer = prepared.base.tokenizer
    if prepared.layout is None:
        from moesaic.data.causal import tokenize

        found = tokenize(prepared.given(examples), tokenizer, prepared.tasks, max_length=prepared.max_length)
        highest = max(max(row["input_ids"]) for row in found)
        embedded = prepared.base.model.get_input_embeddings().num_embeddings
        if highest >= embedded:
            raise ConfigError(
                f"the tokenizer writes token {highest} ({tokenizer.convert_ids_to_tokens(highest)}), and the model "
                f"embeds {embedded}: resize its embeddings (resize_token_embeddings) and save it anew"
            )
        return found
    rows = prepared.given(examples)
    collate = EncoderCollator(tokenizer, prepared.layout, max_length=prepared.max_length)
    collate([max(examples, key=lambda e: len(e.choices))])  # the row with most parts is the one that may not fit
    return rows
