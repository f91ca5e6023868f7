"""What a run says of itself: versions, device, parameters, the command."""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesaic.runs.method import is_routed

PACKAGES = ("moesaic", "torch", "transformers", "peft", "trl", "datasets", "accelerate")


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Installed versions of what a result depends on, `more` beside what all depend on."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command_line(*, but: str | None = None) -> str:
    """The command this process was started with, the program by its bare name, as a user types it.

    Args:
        but: arguments that start so are left out.
    """
    program = Path(sys.argv[0])
    own = [Path(__file__).parents[1] / name for name in ("cli/main.py", "__main__.py")]
    name = "moesaic" if program.resolve() in own else program.name
    return shlex.join([name, *[a for a in sys.argv[1:] if but is None or not a.startswith(but)]])


def device_name(device: Any) -> str:
    """A device in words: the GPU's name, or the processor's kind and the threads used."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory(device: Any) -> dict[str, Any]:
    """The most memory held at once, in MiB, and whose it is: a GPU's allocations since the run began, or the process.

    A process counts from its start, libraries, base model and earlier runs included. It is read from /proc where there
    is one: `getrusage` gives a child what its parent held when it was started.
    """
    if device.type == "cuda":
        import torch

        return {"peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1), "peak_memory_of": "gpu"}
    return {"peak_memory_mib": round(_resident_peak() / 2**20, 1), "peak_memory_of": "process"}


def peak_memory_of(process: int | str) -> float:
    """MiB that a process held at most, by its number. Raises OSError where the system does not tell."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    told = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    if not told:
        raise OSError(f"/proc/{process}/status tells of no memory")
    return int(told[0]) / 1024


def _resident_peak() -> int:
    """Bytes."""
    try:
        return int(peak_memory_of("self") * 2**20)
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def count_trainable(model: Any) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_total(model: Any) -> int:
    """Number of all parameters, a shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def steps_told(results: Mapping[str, Any]) -> str:
    """How many steps were made, and in how many of them the time was: those since the run was last gone on with."""
    resumed = results.get("resumed_from_step") or 0
    return f"{results['steps']:,} steps" + (f", {results['steps'] - resumed:,} of them" if resumed else "")


def trained(results: Mapping[str, Any]) -> list[str]:
    """What training came to, a line each: nothing where no step was made and nothing found."""
    said = []
    if results["steps"]:
        loss = results["final_loss"]
        said.append(
            f"{steps_told(results)} in {results['train_seconds']:.0f} s "
            f"({results['tokens_per_second']:.0f} tokens/s), {results['trainable_parameters']:,} trainable parameters, "
            f"last loss {'unknown' if loss is None else f'{loss:.3f}'}"
        )
    if taken := results.get("taken"):
        said.append(f"the adapter of step {taken['step']}, with the least held-out loss, {taken['eval_loss']:.3f}")
    return [*said, *filter(None, [results.get("found")])]


_CARD = """---
library_name: peft
base_model: {model}
tags: [{tags}]
---

# {method} on {model}

Made with moesaic {version}: `{command}`

{how}

{loading}"""

_PLAIN = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/folder")
```
"""


def model_card(recipe: Any, command: str, how: str) -> str:
    """README.md of an adapter folder: what it is, how it was made and how it is loaded."""
    from moesaic.lora.card import HEADING, LOADING

    routed = is_routed(recipe.method)
    tags = ["moesaic", recipe.method, *(["mixture-of-lora"] if routed else [])]
    return _CARD.format(
        model=recipe.model,
        tags=", ".join(tags),
        method=recipe.method,
        version=version("moesaic"),
        command=command,
        how=how,
        loading=f"{HEADING}\n\n{LOADING if routed else _PLAIN}",
    )
