"""Tiny random models with a tokenizer, written to a folder: what training is tested on."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedTokenizerFast

WORDS = [*"0123456789abcdefghijklmnopqrstuvwxyz", "yes", "no", "good", "bad", "sort", "last", "first", ":", ","]


def tokenizer(*, encoder: bool) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "<cls>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        inner.post_processor = processors.TemplateProcessing(single="<cls> $A", special_tokens=[("<cls>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", cls_token="<cls>"
    )


def save_model(folder: Path, kind: str, *, dropout: float = 0.1) -> Path:
    """A two-layer Llama ("causal") or BERT ("encoder") of a few thousand parameters."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tok = tokenizer(encoder=kind == "encoder")
    common = {"vocab_size": len(tok), "max_position_embeddings": 64, "pad_token_id": 0, **shape}
    if kind == "causal":
        model = AutoModelForCausalLM.from_config(LlamaConfig(eos_token_id=1, bos_token_id=1, **common))
    else:
        model = AutoModel.from_config(
            BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **common)
        )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, kind: str) -> Path:
    """Forty training and twenty validation rows for each of two or three small tasks."""
    random_ = random.Random(0)

    def rows(task: str, n: int) -> list[dict[str, object]]:
        made: list[dict[str, object]] = []
        for _ in range(n):
            digits = random_.sample("0123456789", 4)
            text = " ".join(digits)
            if task == "copy":
                made.append({"task": task, "prompt": f"first {text} :", "completion": digits[0]})
            elif task == "even":
                made.append(
                    {"task": task, "prompt": text, "choices": ["no", "yes"], "answer": int(digits[0] in "02468")}
                )
            else:
                made.append({"task": task, "prompt": f"last {text}", "choices": digits, "answer": 3})
        return made

    for task in ("even", "pick", *(("copy",) if kind == "causal" else ())):
        place = folder / task
        place.mkdir(parents=True)
        for split, n in (("train", 40), ("validation", 20)):
            place.joinpath(f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows(task, n))))
    return folder


def write_world(root: Path) -> Path:
    """A model of each kind, and its data."""
    for kind in ("causal", "encoder"):
        save_model(root / kind, kind)
        write_tasks(root / f"{kind}-data", kind)
    return root
