"""A run of Router-R1: a warm start, GRPO in TRL's trainer, tries while it trains, and a policy in a folder.

OUT/settings.json   what makes it the same run       OUT/checkpoints/   TRL's, to go on from
OUT/metrics.jsonl   a line a step, and a line a try  OUT/policy/        the policy, once it is finished
OUT/results.json    figures of all steps and tries   OUT/report.html    them as curves
OUT/transcripts.jsonl   the batch of the last step that was saved, as it was written
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, MissingDependency, path_of
from moesaic.llms.catalog import Catalog
from moesaic.llms.router_r1 import checkpoints, folder, warm
from moesaic.llms.router_r1.asking import HttpPool
from moesaic.llms.router_r1.engine import Question, roll
from moesaic.llms.router_r1.following import METRICS, TRANSCRIPTS, Say, following, keep_lines, stopping
from moesaic.llms.router_r1.for_trl import Rollouts
from moesaic.llms.router_r1.local import LocalPolicy
from moesaic.llms.router_r1.questions import check_named, read_questions
from moesaic.llms.router_r1.rewards import Rewards
from moesaic.llms.router_r1.settings import DIALECTS, Pool, R1Train
from moesaic.runs import places
from moesaic.runs.folder import atomic_folder, check_writable, locked, read_json, write_json, write_text, writing
from moesaic.runs.results import command_line, versions

CHECKPOINTS, REPORT, WARM = "checkpoints", "report.html", "warm"
_MADE = (CHECKPOINTS, METRICS, REPORT, TRANSCRIPTS, WARM, folder.POLICY)
_APART = frozenset([
    "out", "overwrite", "at_once", "save_every", "retries", "timeout", "data", "eval_data", "catalog", "steps",
])  # fmt: skip
"""Settings that another process may go on with otherwise."""


def train(wanted: R1Train, *, say: Say = lambda line: None) -> dict[str, Any]:
    """Train a policy, or go on where its folder ended.

    Returns:
        results.json: figures by step, tries, seconds.
    Raises:
        ConfigError, DataError: it cannot be begun. KeyboardInterrupt: it was stopped; the same call goes on.
    """
    _check_trl()
    wanted.check()
    out, catalog = path_of(wanted.out), Catalog.read(wanted.catalog)
    check_named(catalog, wanted.dialect)
    asked = read_questions(wanted.data, catalog, wanted.alphas, wanted.seed)
    tried = read_questions(wanted.eval_data, catalog, wanted.alphas, wanted.seed) if wanted.eval_data else []
    check_writable(out, f"out={wanted.out}")
    places.check_ours(out, "a run of Router-R1", {"alpha", "turns", "group"})
    places.check_unfinished(out, overwrite=wanted.overwrite)
    described = {key: value for key, value in dataclasses.asdict(wanted).items() if key not in _APART}
    described |= {f"contents of {name}": _digest(getattr(wanted, name)) for name in ("data", "eval_data", "catalog")}
    policy = _policy(wanted)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), writing(out):
        unfinished = any((out / part).exists() for part in (CHECKPOINTS, WARM))
        places.prepare(out, described, _MADE, overwrite=wanted.overwrite, unfinished=unfinished)
        return _train(wanted, out, policy, catalog, asked, tried, say)


def _train(
    wanted: R1Train, out: Path, policy: LocalPolicy, catalog: Catalog, asked: Sequence[Question],
    tried: Sequence[Question], say: Say,
) -> dict[str, Any]:  # fmt: skip
    begun, pool = time.perf_counter(), pool_of(wanted, wanted.max_tokens, bare=wanted.bare)
    asking = folder.Asking(
        tuple(catalog), tuple(wanted.tell), wanted.turns, wanted.reply_tokens, wanted.max_tokens, wanted.max_new_tokens,
        wanted.bare, wanted.dialect,
    )  # fmt: skip
    try:
        if wanted.warm and checkpoints.last_whole(out / CHECKPOINTS, say) is None:
            _warm(wanted, out / WARM, policy, pool, asking, asked, say)
        rollouts = Rollouts(
            policy, pool, asked, Rewards(wanted.alpha, wanted.metric, wanted.failure), asking.limits(),
            say=asking.say,
        )  # fmt: skip
        if wanted.steps:
            _grpo(wanted, out, rollouts, tried, say)
    finally:
        pool.close()
        tell_failures(pool, say)
    with atomic_folder(out / folder.POLICY) as staging:
        folder.save(policy, asking, staging)
    results = {
        "steps": wanted.steps, "figures": rollouts.figures, "tried": rollouts.tried,
        "seconds": time.perf_counter() - begun, "asked": pool.asked, "hits": pool.hits, "models": list(catalog),
        "settings": dataclasses.asdict(wanted), "command": command_line(), "versions": versions(),
    }  # fmt: skip
    from moesaic.report.router_r1 import page

    write_text(out / REPORT, page(results))
    write_json(out / places.RESULTS, results)
    for part in (CHECKPOINTS, WARM):
        shutil.rmtree(out / part, ignore_errors=True)
    return results


def _digest(file: str) -> str:
    """What a file holds, in short: other questions or models make another run."""
    return sha256(path_of(file).read_bytes()).hexdigest()[:16] if file else ""


def tell_failures(pool: HttpPool, say: Say) -> None:
    """Say why models did not answer, the commonest reasons first."""
    for why, times in pool.failed.most_common(3):
        say(f"{times:,} of {pool.asked - pool.hits:,} calls had no answer: {why}")


def pool_of(wanted: Pool, max_tokens: int, *, bare: bool) -> HttpPool:
    return HttpPool(
        at_once=wanted.at_once, retries=wanted.retries, timeout=wanted.timeout, max_tokens=max_tokens, bare=bare
    )


def _policy(wanted: R1Train) -> LocalPolicy:
    import torch

    loaded = folder.base(wanted.model)
    torch.manual_seed(wanted.seed)
    if wanted.tags:
        warm.with_tags(loaded.model, loaded.tokenizer, wanted.seed)
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.r:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=wanted.r, lora_alpha=2 * wanted.r, target_modules="all-linear"))
    return LocalPolicy(
        model.eval(), loaded.tokenizer, temperature=wanted.temperature, max_new_tokens=wanted.max_new_tokens,
        dialect=DIALECTS[wanted.dialect],
    )  # fmt: skip


def _warm(
    wanted: R1Train, place: Path, policy: LocalPolicy, pool: HttpPool, asking: folder.Asking,
    asked: Sequence[Question], say: Say,
) -> None:  # fmt: skip
    """Imitate transcripts in which a model that is drawn is asked, and the answer is the right one."""
    file = place / "rows.json"
    if file.is_file():
        rows = read_json(file)["rows"]
    else:
        rows = _shown(wanted, policy, pool, asking, asked, say)
        place.mkdir(exist_ok=True)
        write_json(file, {"rows": rows})
    say(f"warm start: {wanted.warm} steps of imitation of {len(rows):,} transcripts")
    try:
        warm.imitate(
            policy, rows, place, steps=wanted.warm, batch_size=wanted.warm_batch, lr=wanted.warm_lr, seed=wanted.seed,
            say=say,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped in the warm start; the same command goes on") from None


def _shown(
    wanted: R1Train, policy: LocalPolicy, pool: HttpPool, asking: folder.Asking, asked: Sequence[Question], say: Say
) -> list[dict[str, list[int]]]:
    """Transcripts to imitate, as rows. Raises ConfigError where there is none."""
    say(f"warm start: asks a model each of {len(asked):,} questions")
    script = warm.Showing(asked, wanted.seed, policy.dialect)
    shown = roll(script, pool, asked, asking.limits(), say=asking.say, dialect=policy.dialect)
    sound = [(r, asking.say(question)) for r, question in zip(shown, asked, strict=True) if not r.fault()]
    if len(sound) < len(asked):
        why = Counter(r.fault() for r in shown if r.fault()).most_common(1)[0][0]
        say(f"{len(asked) - len(sound):,} of {len(asked):,} transcripts cannot be imitated: {why}")
    if not sound:
        raise ConfigError("warm: there is no transcript to imitate; name models otherwise, or leave warm out")
    return warm.rows(policy, [r for r, _ in sound], [text for _, text in sound])


def _grpo(wanted: R1Train, out: Path, rollouts: Rollouts, tried: Sequence[Question], say: Say) -> None:
    from trl import GRPOConfig, GRPOTrainer

    place, policy = out / CHECKPOINTS, rollouts.policy
    cpu = policy.model.device.type == "cpu"
    arguments = GRPOConfig(
        str(place), max_steps=wanted.steps, per_device_train_batch_size=wanted.group * wanted.questions,
        num_generations=wanted.group, learning_rate=wanted.lr, beta=wanted.beta, temperature=wanted.temperature,
        warmup_steps=min(5, wanted.steps // 10), lr_scheduler_type="constant_with_warmup", loss_type="grpo",
        report_to=[], use_cpu=cpu, bf16=False, save_steps=wanted.save_every, save_total_limit=2, seed=wanted.seed,
        gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, log_level="error",
    )  # fmt: skip
    trainer = GRPOTrainer(
        policy.model, rollouts.reward, arguments, rollouts.data(), processing_class=policy.tokenizer,
        rollout_func=rollouts.rollout, callbacks=[
            rollouts.callback(), following(wanted, out, rollouts, tried, say), checkpoints.marking(),
        ],
    )  # fmt: skip
    last = checkpoints.last_whole(place, say)
    if last is not None:
        if checkpoints.step_of(last) > wanted.steps:
            raise ConfigError(f"steps={wanted.steps}: {out} is at step {checkpoints.step_of(last)}; ask for more")
        rollouts.take_back(last)
        say(f"goes on from step {checkpoints.step_of(last)} of {wanted.steps}")
    keep_lines(out / METRICS, len(rollouts.figures.get("reward", ())))
    with stopping(trainer):
        checkpoints.train(trainer, last)
    policy.model.eval()
    if trainer.state.global_step < wanted.steps:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step}; the same command goes on from there")
    if wanted.r:
        policy.model = policy.model.merge_and_unload()


def _check_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError:
        raise MissingDependency("trl", "train,llms") from None
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
