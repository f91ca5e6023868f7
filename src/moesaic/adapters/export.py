"""Out of a composed mixture again: one expert, or, where weights are the same for every input, all of it as one LoRA.

    collapse   sum_e w_e s_e B_e A_e = B' A',  A' the experts' A one above the other (rank sum r_e), B' = [w_e s_e B_e]
               at rank k: the truncated singular value decomposition of B' A', its error told

What is written is a standard PEFT adapter: stock PEFT and vLLM serve it, and moesaic is not needed any more.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moesaic.errors import AdapterError, ConfigError, first_line, suggest
from moesaic.lora.config import MixtureConfig
from moesaic.lora.loading import check_folder, saved_tensors
from moesaic.lora.stored import WEIGHTS
from moesaic.routing import Site

_PREFIX = "base_model.model."
_A, _B, _SCALING = (f".moe_lora_{part}.weight" for part in ("A", "B", "scaling"))
_ROUTER = ".moe_lora_router."


@dataclass(frozen=True)
class Pair:
    """A LoRA of one module: A (r, d_in), B (d_out, r), and its scaling."""

    A: Tensor
    B: Tensor
    scaling: float


def export_expert(folder: Path, expert: str, out: Path) -> dict[str, Pair]:
    """Write one expert of a composed mixture as a PEFT adapter with the rank and scaling that it came with.

    Raises:
        AdapterError: `folder` holds no composed mixture. ConfigError: no such expert, or `out` is there.
    """
    folder = adapter_of(folder)
    config = _composed(folder)
    names = config.experts or []
    if expert not in names:
        raise ConfigError(f"{folder} has no expert {expert!r}; {suggest(expert, names)}")
    number, pairs = names.index(expert), {}
    for module, A, B, scaling, _ in _modules(folder, config):
        a, b = A[number], B[number]
        used = int((a.abs().amax(1) + b.abs().amax(1)).nonzero().max()) + 1 if bool(a.any() or b.any()) else 0
        if used:
            pairs[module] = Pair(a[:used], b[:used].t(), float(scaling[number]))
    if not pairs:
        raise AdapterError(f"expert {expert!r} of {folder} is zero everywhere: there is nothing to export")
    _write(pairs, config, out)
    return pairs


def collapse(folder: Path, out: Path, *, rank: int | None = None) -> dict[str, float]:
    """Write a static mixture as one PEFT adapter; returns, by module, the relative error of what `rank` leaves out.

    Args:
        rank: the largest rank a module may have; all of it where None, and then the error is 0.
    Raises:
        AdapterError: `folder` holds no composed mixture.
        ConfigError: the mixture's weights differ by input, so that it is no one LoRA; or `out` is there.
    """
    folder = adapter_of(folder)
    config = _composed(folder)
    if not config.kind.is_static:
        raise ConfigError(
            f"{folder} holds method {config.method}, whose weights differ by token or prompt: no one LoRA does that. "
            "Only static mixtures (uniform, cat, lorahub) collapse; export expert=NAME writes one of its experts"
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    pairs: dict[str, Pair] = {}
    errors: dict[str, float] = {}
    for module, A, B, scaling, weights in _modules(folder, config):
        if config.kind.merges_factors:
            a, b = (weights[:, None, None] * A).sum(0), ((weights * scaling)[:, None, None] * B).sum(0)
        else:
            kept = [(a, w * s * b) for a, b, w, s in zip(A, B, weights, scaling, strict=True) if bool(b.any())]
            if not kept:
                continue
            a, b = (torch.cat(part) for part in zip(*kept, strict=True))
        used = (a.abs().amax(1) * b.abs().amax(1)) > 0
        if not bool(used.any()):
            continue
        a, b, errors[module] = truncated(a[used], b[used], rank)
        pairs[module] = Pair(a, b.t(), 1.0)
    if not pairs:
        raise AdapterError(
            f"{folder} changes nothing, its experts or their weights being 0: there is nothing to export"
        )
    _write(pairs, config, out)
    return errors


def truncated(A: Tensor, B: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The best factors of B^T A of at most `rank`, and their relative error (Frobenius), from small matrices alone.

    Args:
        A: (R, d_in). B: (R, d_out).
    """
    if rank is None or rank >= len(A):
        return A, B, 0.0
    basis_in, to_in = torch.linalg.qr(A.double().t())
    basis_out, to_out = torch.linalg.qr(B.double().t())
    left, values, right = torch.linalg.svd(to_out @ to_in.t())
    root = values[:rank].sqrt()
    a = root[:, None] * (right[:rank] @ basis_in.t())
    b = root[:, None] * (left[:, :rank].t() @ basis_out.t())
    lost = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    return a.to(A.dtype), b.to(B.dtype), lost


def adapter_of(folder: Path) -> Path:
    """The adapter in a run folder; a folder that is one is itself."""
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def _composed(folder: Path) -> MixtureConfig:
    config = check_folder(folder)
    if config.experts is None:
        raise AdapterError(f"{folder} holds a mixture that was trained as one: its experts are no adapters")
    return config


def _modules(folder: Path, config: MixtureConfig) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Of each module: name, A (E, r, d_in), B (E, r, d_out), scalings (E,), and the weights of a zero input (E,)."""
    try:
        yield from _read_modules(folder, config)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"{folder / WEIGHTS} is damaged ({first_line(error)}): restore it, or compose anew"
        ) from None


def _read_modules(folder: Path, config: MixtureConfig) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    number = config.num_experts
    saved = saved_tensors(folder)
    for key in saved:
        if not key.endswith(_A):
            continue
        whole = key.removesuffix(_A)
        A, B = (saved[whole + part].unflatten(0, (number, -1)) for part in (_A, _B))
        scaling = saved[whole + _SCALING]
        if A.shape[1] != B.shape[1] or len(scaling) != number or len(config.experts or ()) != number:
            raise AdapterError(f"{folder} is damaged: {whole} does not fit its {number} experts; compose anew")
        module = whole.removeprefix(_PREFIX)
        weights = torch.empty(0)
        if config.kind.is_static:
            router = config.router(Site(module, A.shape[-1], B.shape[-1]))
            own = whole + _ROUTER
            router.load_state_dict({k.removeprefix(own): saved[k] for k in saved if k.startswith(own)})
            weights = config.eval_gate()(router.eval()(A.new_zeros(1, A.shape[-1]))).weights[0]
        yield module, A, B, scaling, weights.detach()


def _write(pairs: dict[str, Pair], config: MixtureConfig, out: Path) -> None:
    """A PEFT adapter's folder, whole or not at all."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={out} is already there: name another folder")
    ranks = {module: len(pair.A) for module, pair in pairs.items()}
    alphas = {module: pair.scaling * len(pair.A) for module, pair in pairs.items()}
    r, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    made: Any = LoraConfig(
        r=int(r),
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(pairs),
        rank_pattern={module: rank for module, rank in ranks.items() if rank != r},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        part.chmod(0o755)
        made.save_pretrained(str(part))
        tensors = {}
        for module, pair in pairs.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.A.contiguous()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.B.contiguous()
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
