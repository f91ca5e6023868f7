"""Host: how a mixture lives inside a model it does not own.

Forward hooks on the base model open and close a frame, hooks on each stack read the masks, and the auxiliary
losses enter the output. Hooks on the model, not on the tuner: `generate`, TRL and Transformers bypass the tuner's
own forward.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import TrainingError
from moesaic.host import generation, masks, opening, scores
from moesaic.host.carrier import Delivery, carry
from moesaic.host.checkpointing import bind_frames
from moesaic.host.fitting import by_row, by_token, checked_ids, checked_scores, checked_targets
from moesaic.host.frames import Frame, StackView
from moesaic.host.fused import unfuse
from moesaic.host.memory import remember
from moesaic.host.running import Running, Threads, of_thread
from moesaic.host.stacks import StackHook, inside
from moesaic.host.unused import Unused
from moesaic.routing import AuxiliaryLoss, Record, Records, RoutingContext, Site, TokenSums, no_autocast, pool

logger = logging.getLogger(__name__)

TASK_IDS = "routing_task_ids"
"""Name of the batch key with one task id a sequence. `task_ids` would be swallowed by PEFT."""

TARGETS = "routing_targets"
"""Name of the batch key with what each sequence's routing should be like (batch, E)."""

SCORES = "routing_scores"
"""Name of the batch key with what each sequence's prompt says of the experts (batch, E)."""


class Host:
    """Shared by all mixture layers of one base model. Holds no parameters.

    Attributes:
        losses: adapter name -> its auxiliary losses.
        names: adapter name -> what its experts are called, where they have names.
        active: names of the adapters that answer.
        differing: of these, those that mix by another gate in evaluation than in training.
        readers: adapter name -> what reads its routing scores off the tokens, where they are not given.
        asks: whether a router of these goes "by_prompt" or "by_task".
        batched: the prompts that `generate_batch` answers, in a thread of its own.
        progress: share of the training that is done; None where no trainer tells.
        external: while True, a trainer adds the auxiliary loss itself and the output's loss is left alone.
        threads: what belongs to each thread; what is the current one's are attributes of the host too.
        aux: auxiliary loss of the thread's last training forward with gradients; None before any.
    """

    frame: Any = of_thread("frame")
    aux: Any = of_thread("aux")
    loss_values: Any = of_thread("loss_values")
    traces: Any = of_thread("traces")
    pinned_tasks: Any = of_thread("pinned_tasks")
    pinned_scores: Any = of_thread("pinned_scores")
    told: Any = of_thread("told")

    def __init__(self) -> None:
        self.losses: dict[str, list[AuxiliaryLoss]] = {}
        self.readers: dict[str, scores.Reader] = {}
        self.names: dict[str, list[str]] = {}
        self.step_of: Callable[[str], Hashable] | None = None
        self.active: Callable[[], Sequence[str]] = list
        self.differing: Callable[[], list[str]] = list
        self.asks: Callable[[str], bool] = _nobody
        self.batched: frozenset[tuple[int, ...]] = frozenset()
        self.progress: float | None = None
        self.external = False
        self.threads = Threads()
        self.unused = Unused()
        self._collected: dict[threading.Thread, Tensor] = {}
        self._warned: set[str] = set()
        self._delivery = Delivery()
        self.neighbours: Mapping[Any, Sequence[Any]] = {}
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, wrapped: set[str]) -> dict[str, str]:
        """Hook `model`. Returns, for each wrapped module's name, the name of the stack whose mask it sees."""
        self.detach()
        names = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
        stack_of = {name: max((s for s in names if inside(name, s)), key=len, default="") for name in wrapped}
        # always_call closes the frame when the forward raises; the frame opens first and closes last.
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]
        self.unused = Unused(stack_of)
        for name in set(stack_of.values()):
            stack = model.get_submodule(name)
            hook = StackHook(self, name)
            self._handles.append(stack.register_forward_pre_hook(hook.enter, with_kwargs=True))
            if stack is not model:
                self._handles.append(stack.register_forward_hook(hook.leave, always_call=True))
        generation.tell(model, self)
        self._undo = [partial(generation.untell, model), unfuse(model, wrapped)]
        return stack_of

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._undo:
            self._undo.pop()()

    def __getstate__(self) -> dict[str, Any]:
        """Copies take the hooks and settings along, not what belongs to a running forward."""
        state = self.__dict__.copy()
        state.update(_collected={})
        return state

    # -- what layers call ----------------------------------------------------------------------------------------

    def view(self, stack: str, cross: bool, frame: Frame | None = None) -> StackView:
        """What is known of the tokens that run through a stack; of the encoder's where it attends `cross` to them."""
        frame = frame or self.frame
        found = None if frame is None else frame.stacks.get(f"{stack}/cross" if cross else stack)
        return found or StackView()

    def context(self, site: Site, stack: str, cross: bool, h: Tensor) -> RoutingContext:
        """What the router at `site` may see of the current forward; its tensors have `h`'s leading shape."""
        frame = self.frame
        if frame is None:
            return RoutingContext(site, task_ids=self.pinned_tasks, scores=self.pinned_scores)
        view = self.view(stack, cross, frame).on(h.device)
        if site.reads_the_cache and h.dim() == 3 and view.tokens is not None and h.shape[1] > view.tokens:
            given = frame.memory.given if frame.keeps else h.shape[1]
            view = view.widened(h.shape[0], h.shape[1], given)
        return RoutingContext(
            site,
            mask=by_token(view.mask, h),
            sequences=by_token(view.sequences, h),
            prompt=by_token(view.prompt, h),
            task_ids=self._by_row(frame.task_ids, site, h, view, TASK_IDS),
            targets=self._by_row(frame.targets, site, h, view, TARGETS),
            scores=frame.scores if frame.paged else self._by_row(frame.scores, site, h, view, SCORES),
            progress=1.0 if self.progress is None else self.progress,
            state=frame.state,
            whole=frame.complete,
            memory=frame.memory,
            sums=frame.sums if view.cached else TokenSums(),
        )

    def _by_row(self, values: Tensor | None, site: Site, h: Tensor, view: StackView, key: str) -> Tensor | None:
        if values is None:
            return None
        dealt = "experts" in site.name.split(".")
        return by_row(values, h, view.tokens, key, parts=self.frame.parts, dealt=dealt)

    @property
    def recomputing(self) -> bool:
        """Inside checkpointing's second run of a layer: records were already written by the first."""
        if self.threads.current().recomputing:
            return True
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

    def wants(self, adapter: str) -> bool:
        """Whether the current forward needs this adapter's records."""
        running = self.threads.current()
        frame = running.frame
        if frame is None or not (running.traces or (frame.training and frame.grad and self.losses.get(adapter))):
            return False
        return not self.recomputing

    def needs_hidden(self, adapter: str) -> bool:
        frame = self.frame
        return frame is not None and frame.training and any(loss.needs_hidden for loss in self.losses.get(adapter, []))

    def needs_experts(self, adapter: str) -> bool:
        return any(loss.needs_experts for loss in self.losses.get(adapter, []))

    def sequence_means(self, h: Tensor, context: RoutingContext) -> Tensor:
        """Mean of `h` over the real tokens of each sequence (sequences, d_in), detached."""
        frame = self.frame
        if frame is not None and frame.pooled is not None and frame.pooled[0] is h:
            return frame.pooled[1]
        with torch.no_grad(), no_autocast(h.device.type):
            means = pool(h if h.dtype == torch.float64 else h.float(), context.mask, context.sequences)
        if frame is not None:
            frame.pooled = (h, means)
        return means

    def in_float32(self, h: Tensor) -> Tensor:
        """`h` in float32 (float64 stays), cast once for neighbours that read the same tensor."""
        if h.dtype in (torch.float32, torch.float64):
            return h
        frame = self.frame
        if frame is None or torch.compiler.is_compiling():
            return h.float()
        what = h, 0 if h.is_inference() else h._version, torch.is_grad_enabled()
        if frame.cast is None or frame.cast[0] is not h or frame.cast[1:3] != what[1:]:
            frame.cast = (*what, h.float())
        return frame.cast[3]

    def record(self, adapter: str, record: Record) -> None:
        frame, runs = self.frame, 0
        if frame is None:
            return
        while (record.site.name, adapter, runs) in frame.records:
            runs += 1
        frame.records[record.site.name, adapter, runs] = record

    def called(self, name: str) -> Frame | None:
        """Told that a wrapped module runs: in which frame it does."""
        frame: Frame | None = self.frame
        if frame is not None and frame.complete:
            self.unused.called(frame, name)
        return frame

    @contextmanager
    def use(self, frame: Frame | None) -> Iterator[None]:
        """Recompute under `frame`: what non-reentrant checkpointing enters before it runs a layer again."""
        running = self.threads.current()
        previous, running.frame, running.recomputing = running.frame, frame, True
        try:
            yield
        finally:
            running.frame, running.recomputing = previous, False

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _open(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        task_ids, targets, given = (kwargs.pop(key, None) for key in (TASK_IDS, TARGETS, SCORES))
        arguments = masks.bind(model, args, kwargs)
        self.frame = opening.of_model(model, arguments, self)
        rows = masks.num_rows(kwargs) if self.frame.training else None
        if task_ids is not None:
            self.frame.task_ids = checked_ids(task_ids, TASK_IDS, rows=rows)
        if targets is not None:
            self.frame.targets = checked_targets(targets, TARGETS, rows=rows)
        if given is not None:
            self.frame.scores = checked_scores(given, SCORES)
        reader = next((self.readers[name] for name in self.active() if name in self.readers), None)
        scores.find(self.frame, arguments, reader)
        if self.frame.training and self.frame.grad:
            self.frame.neighbours = self.neighbours
            bind_frames(model, self)
        return args, kwargs

    def _close(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        frame, self.frame = self.frame, None
        if frame is None or output is None:
            return None
        self.unused.check(frame)
        self.show_traces(frame)
        made = masks.cache_of(output) if frame.keeps and isinstance(output, Mapping) else None
        if made is not None:  # perhaps a cache that the model made within this forward
            remember(made, frame.memory)
        aux = self.auxiliary_loss(frame) if frame.training and frame.grad else None
        if aux is None:
            frame.release()
            return None
        self.aux = aux
        if self.external:
            thread = threading.current_thread()  # the thread itself: its number is used again once it has ended
            self._collected[thread] = self._collected[thread] + aux if thread in self._collected else aux
        if aux.requires_grad and not torch.compiler.is_compiling():
            adapter = next(iter(frame.records))[1]
            step = self.step_of(adapter) if self.step_of else None
            self._delivery.expect(aux, adapter=adapter, step=step, warn=self.warn_once)
            aux.register_hook(partial(_let_go, self.threads.current(), weakref.ref(aux)))
        frame.release()
        return carry(frame, output, aux, external=self.external, warn=self.warn_once)

    def auxiliary_loss(self, frame: Frame) -> Tensor | None:
        """Weighted sum of all active adapters' losses over the frame's records; None when there are none."""
        total: Tensor | None = None
        self.loss_values = {}
        for adapter, losses in self.losses.items():
            records = Records(record for (_, name, _), record in frame.records.items() if name == adapter)
            if not records:
                continue
            step = self.step_of(adapter) if self.step_of else None
            for loss in losses:
                with no_autocast(records[0].routing.logits.device.type):
                    value = loss(records, step)
                self.loss_values[type(loss).__name__] = value.detach()
                total = loss.weight * value + (0 if total is None else total.to(value.device))
        return total

    def show_traces(self, frame: Frame) -> None:
        for trace in self.traces:
            trace.update(list(frame.records.values()))

    def take_aux(self) -> Tensor | None:
        """The auxiliary loss, once: the next call gives None until another training forward."""
        aux, self.aux = self.aux, None
        return aux

    def take_collected(self) -> Tensor | None:
        """The sum of all forwards' since it was last taken, while `external`; of replicas in threads, their mean."""
        found, self._collected = [*self._collected.values()], {}
        return torch.stack([aux.to(found[0].device) for aux in found]).mean() if found else None

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _let_go(running: Running, aux: Callable[[], Tensor | None], grad: Tensor) -> None:
    """Keep the auxiliary loss's value alone once its gradient has passed: its graph holds activations."""
    if running.aux is not None and running.aux is aux():
        running.aux = running.aux.detach()


def _nobody(what: str) -> bool:
    return False


def find_host(model: nn.Module) -> Host:
    """The host of the mixture in `model`.

    Raises:
        TrainingError: when the model holds no mixture.
    """
    for module in model.modules():
        host = getattr(module, "host", None)
        if isinstance(host, Host):
            return host
    raise TrainingError("this model holds no moesaic mixture: wrap it with peft.get_peft_model first")
