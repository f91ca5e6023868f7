"""The stacks of a model (T5's encoder and decoder, a vision tower): each has masks of its own."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from moesaic.host import masks, opening
from moesaic.host.frames import Frame, StackView
from moesaic.host.paged import is_paged


class Opener(opening.Known, Protocol):
    """Whoever has the frame of the running forward, and opens one for a stack that is called on its own."""

    frame: Any

    def show_traces(self, frame: Frame) -> None: ...


def inside(name: str, stack: str) -> bool:
    return stack == "" or name == stack or name.startswith(f"{stack}.")


class StackHook:
    """Reads a stack's masks into the frame. A stack called on its own (T5's encoder in `generate`) opens a frame."""

    def __init__(self, host: Opener, name: str) -> None:
        self.host, self.name = host, name

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        host, arguments = self.host, masks.bind(module, args, kwargs)
        if host.frame is None:
            host.frame = opening.of_stack(module, host)
            host.frame.stack = self.name
        if is_paged(arguments):
            sequences = None if host.frame.paged is None else host.frame.paged.sequences
            tokens = masks.num_tokens(arguments)
            host.frame.stacks[self.name] = StackView(None, sequences, tokens, host.frame.prompt, cached=True)
            return
        own, cross = masks.view_of(
            arguments,
            training=host.frame.training and host.frame.grad,
            tokens=host.frame.tokens,
            prompt=1 if host.told is None else host.told.length,
        )
        prompt = host.frame.prompt if own.prompt is None else own.prompt
        if prompt is not None and prompt.shape[1] == own.tokens:
            own.prompt = masks.given(prompt, own.mask, own.sequences, labels=host.frame.labelled)
        host.frame.stacks[self.name] = own
        host.frame.stacks[f"{self.name}/cross"] = cross

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self.host.frame
        if frame is None or frame.stack != self.name:
            return
        self.host.frame = None
        if output is not None:
            self.host.show_traces(frame)
