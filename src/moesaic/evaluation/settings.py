"""What `moesaic eval` is told."""

from dataclasses import dataclass, field


@dataclass
class EvalSettings:
    """Settings of `moesaic eval`; what is left out is the run's own."""

    split: str = field(default="validation", metadata={"help": "train, validation or test"})
    data: str | None = field(default=None, metadata={"help": "other data than the run's own"})
    model: str = field(default="", metadata={"help": "the base model, where a folder names none or it has moved"})
    prompts: str = field(default="", metadata={"help": "chat: in the tokenizer's chat template; plain: as written"})
    tasks: list[str] | None = field(default=None, metadata={"help": "which tasks, comma-separated"})
    limit: int | None = field(default=None, metadata={"help": "rows a task, for a quick look"})
    batch_size: int = field(default=32, metadata={"help": "rows in a forward"})
    base: bool = field(default=True, metadata={"help": "also score the untrained base"})
