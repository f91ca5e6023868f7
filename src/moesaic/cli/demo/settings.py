"""What `moesaic demo` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesaic.errors import ConfigError, suggest

ACTS = ("adapters", "mixture")


@dataclass
class DemoSettings:
    """Settings of `moesaic demo`."""

    act: str = field(default="both", metadata={"help": "adapters, mixture or both"})
    out: str = field(default="runs/demo", metadata={"help": "folder; a demo there is gone on with, or done anew"})
    overwrite: bool = field(default=False, metadata={"help": "replace a demo with other settings that is there"})
    adapter_steps: int = field(default=200, metadata={"help": "act one: optimizer steps of each adapter"})
    steps: int = field(default=400, metadata={"help": "act two: optimizer steps of each run"})
    lr: float = field(default=1e-2, metadata={"help": "peak learning rate of all"})
    seed: int = field(default=0, metadata={"help": "of data, weights and order"})
    train_per_task: int = field(default=2000, metadata={"help": "training lists a task"})
    test_per_task: int = field(default=150, metadata={"help": "held-out lists a task"})

    @property
    def acts(self) -> tuple[str, ...]:
        return ACTS if self.act == "both" else (self.act,)

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        from moesaic.runs.recipe import Recipe, check

        if not self.out.strip() or self.out.encode(errors="ignore").decode() != self.out:
            raise ConfigError("out must name a folder, in UTF-8")
        if self.act not in (*ACTS, "both"):
            raise ConfigError(f"act={self.act}; {suggest(self.act, (*ACTS, 'both'))}")
        for name in ("train_per_task", "test_per_task", "adapter_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        check(Recipe(steps=self.steps, lr=self.lr, seed=self.seed))
