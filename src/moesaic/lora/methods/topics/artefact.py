"""What stage 1 makes and stages 2 and 3 use: a `Topics`, in memory or as one `.safetensors` file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import ConfigError, first_line, path_of
from moesaic.lora.methods.topics import encoders, features, graph, vocabulary
from moesaic.lora.methods.topics.settings import WEIGHTS, TopicSettings, is_kind

PROPAGATION = 0.5
RELEVANCE_TEMPERATURE = 0.07
FLOOR = 0.05
COINCIDE = 0.99
"""Prototypes of a larger cosine are one: softmax(cos / 0.1) gives them weights within a tenth of each other."""
_FORMAT = "moesaic-topics-1"
_TENSORS = {"assignment": ("Nt", "E"), "prototypes": ("E", "dg"), "features": ("Nt", "f"), "adjacency": ("Nt", "Nt")}
_FACTS = ("loss_before", "loss_after", "link_auc")


@dataclass
class Topics:
    """Topics, the graph between them, and the experts among them. Nt topics, E experts, all float32 on the CPU.

    Attributes:
        prototypes: C (E, topic_dim), unit rows: what routers compare with.
        assignment: P (Nt, E), rows sum to 1.
        features: X (Nt, f), unit rows, of `settings.encoder`.
        adjacency: Adj (Nt, Nt), symmetric, zero diagonal.
        facts: loss_before, loss_after and link_auc (None without edges).
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    prototypes: Tensor
    assignment: Tensor
    features: Tensor
    adjacency: Tensor
    settings: TopicSettings
    facts: dict[str, float | None]

    def relevance(self, queries: Tensor) -> Tensor:
        """How much each topic is a query's: unit rows (N, f) -> (N, Nt), rows sum to 1.

        s = cos(q, X), half of it replaced by the neighbours' mean; softmax(s / 0.07).
        """
        cosines = queries @ self.features.t()
        loops = self.adjacency + torch.eye(len(self.adjacency))
        spread = cosines @ (loops / loops.sum(dim=1, keepdim=True)).t()
        return torch.softmax(torch.lerp(cosines, spread, PROPAGATION) / RELEVANCE_TEMPERATURE, dim=-1)

    def targets(self, prompts: Sequence[str]) -> Tensor:
        """g (N, E): what the routing of each prompt should be like; rows sum to 1, no entry is below 0.05 / E.

        Only the prompt is read, never the answer. Equal prompts are encoded once.
        """
        if not prompts:
            return torch.empty(0, len(self.prototypes))
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        queries = encoders.encoder(self.settings.encoder)(list(distinct)).float()
        if queries.shape[1] != self.features.shape[1]:
            raise ConfigError(
                f"encoder={self.settings.encoder} gives {queries.shape[1]} numbers a text, the topics have "
                f"{self.features.shape[1]}: they were made with another encoder"
            )
        mixed = (1 - FLOOR) * (self.relevance(queries) @ self.assignment) + FLOOR / len(self.prototypes)
        return mixed[[distinct[prompt] for prompt in prompts]]

    def doubts(self) -> list[str]:
        """What speaks against training with these topics, a line each."""
        found, edges = [], self.settings
        if not self.adjacency.any() and (edges.jaccard or edges.cosine or edges.group):
            found.append(
                "no two topics are connected, so there is no graph to learn from: list more tasks for each topic"
            )
        if self.settings.steps == 0:
            found.append("steps=0 leaves the graph's embedding as it was drawn")
        same = (self.prototypes @ self.prototypes.t() > COINCIDE).fill_diagonal_(False).any(dim=1)
        if same.any():
            found.append(
                f"the prototypes of experts {_listed(same)} coincide, so tokens cannot tell them apart: take fewer "
                "experts, a larger topic_dim, or separation above 0"
            )
        owned = torch.bincount(self.assignment.argmax(dim=1), minlength=len(self.prototypes))
        if not owned.all():
            found.append(f"no topic has its largest share in experts {_listed(owned == 0)}: take fewer")
        if len(owned) > 2 and owned.max() > len(self.names) / 2:
            found.append(
                f"expert {int(owned.argmax())} has the largest share of {int(owned.max())} of {len(self.names)} "
                "topics: their prompts are not told apart"
            )
        return found

    def save(self, file: str | Path) -> None:
        """Write one `.safetensors` file, whole or not at all; equal topics give equal bytes."""
        file = path_of(file)
        described = {
            "format": _FORMAT,
            "names": self.names,
            "groups": self.groups,
            "settings": dataclasses.asdict(self.settings),
            "facts": self.facts,
        }
        # one key: safetensors writes several in any order
        content = save(
            {name: getattr(self, name).contiguous() for name in _TENSORS},
            metadata={"topics": json.dumps(described, sort_keys=True, ensure_ascii=False)},
        )
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            part.write_bytes(content)
            os.replace(part, file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ConfigError(f"cannot write {file}: {error.strerror or first_line(error)}") from None

    @classmethod
    def load(cls, file: str | Path) -> Topics:
        """Read a file that `save` wrote. Raises ConfigError where it is missing, damaged or something else."""
        file = path_of(file)
        if not file.is_file():
            raise ConfigError(f"no topics file {file}: make one with `moesaic topics build out={file}`")
        made = None
        try:
            with safe_open(file, framework="pt") as stored:
                described = json.loads((stored.metadata() or {}).get("topics", "{}"))
                if isinstance(described, dict) and described.get("format") == _FORMAT:
                    made = cls._described(described, {name: stored.get_tensor(name) for name in _TENSORS})
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"no {error} in it" if isinstance(error, KeyError) else first_line(error)
            raise ConfigError(f"{file} is damaged: {said}: make it anew with `moesaic topics build`") from None
        if made is None:
            raise ConfigError(f"{file} is no topics file: make one with `moesaic topics build out=…`")
        return made

    @classmethod
    def _described(cls, described: dict[str, Any], tensors: dict[str, Tensor]) -> Topics:
        """From what `save` wrote. Raises ConfigError, KeyError or TypeError for what it cannot have written."""
        settings = TopicSettings(**described["settings"])
        settings.check()
        names, groups = tuple(described["names"]), tuple(described["groups"])
        made = cls(names, groups, **tensors, settings=settings, facts=described["facts"])
        flaw = made._flaw()
        if flaw:
            raise ConfigError(flaw)
        return made

    def _flaw(self) -> str:
        """What cannot be in it, or does not go together; empty where all is well."""
        if not all(isinstance(name, str) for name in (*self.names, *self.groups)):
            return "names and groups must be texts"
        if len(self.groups) != len(self.names):
            return f"there are {len(self.names)} names, but {len(self.groups)} groups"
        sizes = {"Nt": len(self.names)}
        for name, shape in _TENSORS.items():
            tensor = getattr(self, name)
            wanted = tuple(sizes.setdefault(axis, size) for axis, size in zip(shape, tensor.shape, strict=False))
            if tensor.dtype != torch.float32 or tensor.shape != wanted or len(wanted) != 2 or not tensor.numel():
                return f"{name} must be float32 of shape ({', '.join(shape)}), and is {tensor.dtype} {[*tensor.shape]}"
            if not tensor.isfinite().all():
                return f"{name} holds numbers that are not finite"
        if not isinstance(self.facts, dict) or self.facts.keys() != set(_FACTS):
            return f"facts must be {', '.join(_FACTS)}"
        for name, value in self.facts.items():
            if not is_kind(value, "float") and not (name == "link_auc" and value is None):
                return f"{name}={value} must be a finite number"
        return ""


def _listed(which: Tensor) -> str:
    return ", ".join(map(str, which.nonzero().flatten().tolist()))


def build(settings: TopicSettings | None = None, *, encode: encoders.Encoder | None = None, **changes: Any) -> Topics:
    """Stage 1: read the vocabulary, encode its topics, connect them, embed the graph and place the experts.

    Seconds on a CPU. Equal settings give equal topics on one machine.

    Args:
        settings: the defaults where None; `changes` are put on top: `build(num_experts=4)`.
        encode: used instead of `settings.encoder` for the topics; targets still ask for that one by name.

    Raises:
        DataError: a vocabulary or list of tasks that cannot be read.
        ConfigError: impossible settings; more experts than topics; weights too large to compute with.
    """
    settings = dataclasses.replace(settings or TopicSettings(), **changes)
    settings.check()
    nodes = vocabulary.load(settings.vocabulary, settings.tasks or ()).topics(settings.level)
    if len(nodes) < max(settings.num_experts, 2):
        raise ConfigError(
            f"num_experts={settings.num_experts} needs as many topics, and at least two, but there are {len(nodes)} "
            f"(level={settings.level}; a keyword counts when two tasks or more carry it)"
        )
    # PEFT may build routers on another device or without gradients
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        texts = [topic.text for topic in nodes]
        x = encode(texts) if encode is not None else features.of(texts, settings.encoder)
        x = F.normalize(x.detach().float().cpu(), dim=-1)
        edges = graph.adjacency(nodes, x, jaccard=settings.jaccard, cosine=settings.cosine, group=settings.group)
        made = graph.embed(
            edges,
            x,
            num_experts=settings.num_experts,
            topic_dim=settings.topic_dim,
            steps=settings.steps,
            separate=settings.separation,
            seed=settings.seed,
        )
    facts = {"loss_before": made.loss_before, "loss_after": made.loss_after, "link_auc": made.link_auc}
    names, groups = tuple(t.name for t in nodes), tuple(t.group for t in nodes)
    topics = Topics(names, groups, made.prototypes, made.assignment, x, edges, settings, facts)
    flaw = topics._flaw()
    if flaw:
        weights = " ".join(f"{name}={getattr(settings, name):g}" for name in WEIGHTS)
        raise ConfigError(f"{flaw} with {weights} encoder={settings.encoder}: take smaller weights or another encoder")
    return topics
