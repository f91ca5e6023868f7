"""Pre-train nano from nothing: tokenizer, weights, record of the run.

    python -m moesaic.models.nano.pretrain --out src/moesaic/nano/weights

Llama, d=192, 6 layers, 2.8 M parameters, on text that ``corpus`` generates; about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moesaic.errors import TrainingError
from moesaic.models.nano.corpus import DOMAINS, lines

log = logging.getLogger(__name__)

LENGTH, ROWS = 128, 16  # 2,048 tokens a step
VOCABULARY = 768
FRESH_SEED = 1_000_003  # of the lines that a run is scored on; its corpus has the seed of the run
CHAT = """
{%- set said = namespace(last='') -%}
{%- for message in messages -%}
{%- set text = message['content'] -%}
{%- if message['role'] == 'assistant' -%}
{%- if said.last.strip() and text[:1].strip() -%}{{ ' ' }}{%- endif -%}
{{ text + eos_token }}
{%- set said.last = '' -%}
{%- else -%}
{%- if said.last -%}{{ '\\n' }}{%- endif -%}
{{ text }}
{%- set said.last = text[-1:] -%}
{%- endif -%}
{%- endfor -%}
""".replace("\n", "")
"""A chat as the corpus has its lines: an answer behind its prompt and a blank, then EOS."""


def train_tokenizer(seed: int, documents: int = 60_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded. No token spans two words, two digits or two marks.

    There is no post-processor: nothing is put before or after a text, and ``<eos>`` doubles as ``<bos>``, since
    in the corpus it stands before a document as well as after one.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = lines(seed)
    tokenizer.train_from_iterator((next(stream).text for _ in range(documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """The untrained model, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config)


def rows_of_tokens(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Rows of LENGTH ids. A row starts where a document starts, as prompts do, with or without an ``<eos>`` first."""
    stream, coin, eos = lines(seed), random.Random(seed), tokenizer.eos_token_id
    while True:
        row = [eos] if coin.random() < 0.5 else []
        while len(row) < LENGTH:
            for ids in tokenizer([next(stream).text for _ in range(4)])["input_ids"]:
                row += [*ids, eos]
        yield row[:LENGTH]


def optimisers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding (tied with the head) and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.012, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, done: float) -> float:
    """The share of the peak learning rate: 40 steps of warm-up, flat to 55 % of the run, then linear to 2 %."""
    return min(1.0, (step + 1) / 40, max(0.02, (1.0 - done) / 0.45))


@torch.no_grad()
def score(
    pairs: Iterable[tuple[str, str]], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Over (prompt, answer) pairs: the share whose whole answer, ``<eos>`` included, is the arg max (what greedy
    decoding would say), and the mean loss of an answer's tokens.
    """
    sequences, starts = [], []
    for prompt, answer in pairs:
        asked, said = tokenizer([prompt, answer])["input_ids"]
        starts.append(len(asked))
        sequences.append([*asked, *said, tokenizer.eos_token_id])
    width = max(map(len, sequences))
    ids = torch.tensor([s + [tokenizer.pad_token_id] * (width - len(s)) for s in sequences])
    place = torch.arange(width)
    ends = torch.tensor([len(s) for s in sequences])
    answers = (place >= torch.tensor(starts)[:, None]) & (place < ends[:, None])
    # Padding is on the right, where causal attention never looks.
    logits, target, wanted = model(input_ids=ids).logits[:, :-1].float(), ids[:, 1:], answers[:, 1:]
    right = ((logits.argmax(-1) == target) | ~wanted).all(1)
    loss = F.cross_entropy(logits[wanted], target[wanted])
    return {"exact_match": round(right.float().mean().item(), 4), "answer_loss": round(loss.item(), 4)}


def score_fresh(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, dict[str, float]]:
    """``score`` on ``count`` lines of each domain from another seed, and of sorting alone.

    Fresh does not mean unseen: dates, logic and short lists repeat lines that were trained on.
    """
    model.eval()
    scores = {}
    for domain in ("sort", *DOMAINS):
        stream = lines(FRESH_SEED, domain="lists" if domain == "sort" else domain)
        wanted = (line for line in stream if domain != "sort" or line.prompt.startswith("sort "))
        scores[domain] = score([(line.prompt, line.answer) for line in islice(wanted, count)], model, tokenizer)
    model.train()
    return scores


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int | None, minutes: float
) -> dict[str, float]:
    """Train in place for so many steps, or (``steps=None``) so many minutes; the schedule follows either."""
    optims = optimisers(model)
    peaks = [[group["lr"] for group in optim.param_groups] for optim in optims]
    batches = rows_of_tokens(tokenizer, seed)
    began, losses, step = time.perf_counter(), [], 0
    model.train()
    while (done := step / steps if steps else (time.perf_counter() - began) / (60 * minutes)) < 1:
        for optim, tops in zip(optims, peaks, strict=True):
            for group, top in zip(optim.param_groups, tops, strict=True):
                group["lr"] = top * rate(step, done)
        ids = torch.tensor([next(batches) for _ in range(ROWS)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is not finite at step {step}: lower the learning rates in optimisers()")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            seconds = time.perf_counter() - began
            log.info("step %d, %.0f s (%.0f %%), loss %.3f", step, seconds, 100 * done, sum(losses[-50:]) / 50)
        if step % 500 == 0:
            scores = score_fresh(model, tokenizer, 100)
            log.info("exact match: %s", " ".join(f"{name} {s['exact_match']:.2f}" for name, s in scores.items()))
    seconds = time.perf_counter() - began
    final = losses[-100:]
    return {
        "steps": step,
        "tokens": step * ROWS * LENGTH,
        "seconds": round(seconds, 1),
        "final_loss": round(sum(final) / len(final), 4),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, object]) -> None:
    """Weights as bf16, tokenizer and record, each file complete before it takes its name.

    The record's scores are those of the rounded weights, which are the ones that others load.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16()
    with tempfile.TemporaryDirectory(dir=out, prefix=".part-") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        record["fresh_lines"] = score_fresh(model.float(), tokenizer, 300)
        record["sha256"] = hashlib.sha256((Path(part) / "model.safetensors").read_bytes()).hexdigest()
        (Path(part) / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        for file in sorted(Path(part).iterdir()):
            file.chmod(0o644)  # safetensors leaves its file readable by its owner alone
            os.replace(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer and training.json")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="train for so many steps of 2,048 tokens (reproducible)")
    length.add_argument("--minutes", type=float, default=13.0, help="train for so long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and of the initial weights")
    args = parser.parse_args()
    if (args.steps is not None and args.steps < 1) or args.minutes <= 0 or args.seed == FRESH_SEED:
        parser.error(f"--steps and --minutes must be positive, --seed other than {FRESH_SEED}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = train_tokenizer(args.seed)
    model = build_model(len(tokenizer), args.seed)
    figures = train(model, tokenizer, seed=args.seed, steps=args.steps, minutes=args.minutes)
    record = {
        "command": shlex.join(["python", "-m", "moesaic.models.nano.pretrain", *sys.argv[1:]]),
        "seed": args.seed,
        **figures,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    save(model, tokenizer, args.out, record)
    log.info("%s", json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
