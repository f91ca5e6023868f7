"""The published recipe as a configuration of verl, whose trainer wants GPUs: written here, not run here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moesaic.errors import ConfigError, path_of
from moesaic.llms.catalog import Catalog
from moesaic.llms.router_r1.engine import Question, plainly
from moesaic.llms.router_r1.questions import read_questions
from moesaic.llms.router_r1.settings import R1Export
from moesaic.runs.folder import check_writable, write_text, writing
from moesaic.runs.settings import check_within

CONFIG, DATA = "router_r1.yaml", "train.jsonl"
_HEAD = """# Router-R1's published training (arXiv 2506.09033, released code) in verl's words; moesaic has not run it.
# Rollouts in rounds are an agent loop of verl's that calls moesaic.llms.router_r1.engine, rewards are
# moesaic.llms.router_r1.rewards.Rewards(alpha) with one window of costs for all workers. `info_mask` of the released
# code is what verl calls the response mask: tokens of replies are 0 in it.
"""


def recipe(model: str, alpha: float, data: str) -> dict[str, Any]:
    """PPO with GAE, γ = λ = 1; clip 0.2, value clip 0.5; KL 0.001 in the reward; batch 64; 225 steps on 4 GPUs."""
    return {
        "algorithm": {
            "adv_estimator": "gae", "gamma": 1.0, "lam": 1.0, "use_kl_in_reward": True,
            "kl_ctrl": {"type": "fixed", "kl_coef": 0.001},
        },
        "data": {
            "train_files": data, "train_batch_size": 64, "max_prompt_length": 4096, "max_response_length": 1024,
        },
        "actor_rollout_ref": {
            "model": {"path": model},
            "actor": {
                "optim": {"lr": 1e-6}, "ppo_mini_batch_size": 32, "ppo_micro_batch_size_per_gpu": 8, "ppo_epochs": 1,
                "clip_ratio": 0.2, "entropy_coeff": 0.001, "grad_clip": 1.0, "use_kl_loss": False,
            },
            "rollout": {
                "n": 1, "temperature": 1.0, "top_p": 0.95, "multi_turn": {"enable": True, "max_assistant_turns": 5},
            },
        },
        "critic": {"model": {"path": model}, "optim": {"lr": 1e-5}, "cliprange_value": 0.5},
        "trainer": {"total_training_steps": 225, "n_gpus_per_node": 4, "nnodes": 1, "project_name": "router-r1"},
        "router_r1": {"alpha": alpha, "metric": "em", "turns": 4, "start_length": 2048, "reply_tokens": 600},
    }  # fmt: skip


def rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Questions in the columns that verl's data sets have."""
    return [
        {
            "data_source": "router_r1", "prompt": [{"role": "user", "content": plainly(question)}], "ability": "qa",
            "reward_model": {"style": "rule", "ground_truth": list(question.truths)}, "extra_info": {"index": number},
        }
        for number, question in enumerate(questions)
    ]  # fmt: skip


def export(wanted: R1Export) -> list[Path]:
    """Write a configuration and its data. Raises ConfigError, DataError."""
    check_within(wanted, {"alpha": (0, 1)})
    questions = read_questions(wanted.data, Catalog.read(wanted.catalog))
    out = path_of(wanted.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={wanted.out} is a file; name a folder")
    check_writable(out, f"out={wanted.out}")
    there = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if there - {CONFIG, DATA} or (there and CONFIG not in there):
        raise ConfigError(f"out={wanted.out} holds files that are not an export's; name another folder")
    if there and not wanted.overwrite:
        raise ConfigError(f"{wanted.out} holds an export; overwrite=true replaces it")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        config, data = out / CONFIG, out / DATA
        write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(questions)))
        text = yaml.safe_dump(recipe(wanted.model, wanted.alpha, DATA), sort_keys=False)
        write_text(config, _HEAD + text)
    return [config, data]
