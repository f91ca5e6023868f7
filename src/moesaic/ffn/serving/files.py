"""Experts on disk: read one at a time out of the folder that a converted model was saved into.

An expert's weights lie in one piece in each bank's tensor, so a safetensors file can be read at that place. Reads go
past the page cache where the system allows it (O_DIRECT): what is kept in memory is the cache's to say.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moesaic.errors import AdapterError

BLOCK = 4096
"""What direct reads are aligned to."""
CHECKSUMS = "experts.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Piece:
    """One expert's part of one tensor."""

    name: str
    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class ExpertFiles:
    """The experts of a folder's banks, by layer and number.

    Args:
        folder: of a converted model.
        banks: the names of the bank modules, in the order of the layers.
        direct: read past the page cache; where the file system refuses, reads go through it.
    Raises:
        AdapterError: a bank is missing from the folder, or a file is none of safetensors.
    """

    def __init__(self, folder: Path, banks: list[str], *, direct: bool = True) -> None:
        self.folder, self.direct = folder, direct
        self._checksums = _checksums(folder)
        found = _tensors(folder)
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        for layer, bank in enumerate(banks):
            own = {name: entry for name, entry in sorted(found.items()) if name.startswith(f"{bank}.")}
            if not own:
                raise AdapterError(f"{folder} holds no weights of {bank}: convert the model again")
            for name, (file, offset, entry) in own.items():
                number, *rest = entry["shape"]
                if entry["dtype"] not in _DTYPES:
                    raise AdapterError(
                        f"{folder} has experts in {entry['dtype']}: save the model in float32, bfloat16 or float16"
                    )
                begin, end = entry["data_offsets"]
                size = (end - begin) // number
                for expert in range(number):
                    piece = Piece(
                        name.removeprefix(f"{bank}."),
                        file,
                        offset + begin + expert * size,
                        size,
                        _DTYPES[entry["dtype"]],
                        tuple(rest),
                    )
                    self._pieces.setdefault((layer, expert), []).append(piece)

    def size(self, layer: int, expert: int) -> int:
        """Of an expert, in bytes, as it lies on disk."""
        return sum(piece.size for piece in self._pieces[layer, expert])

    def check(self, layer: int, expert: int, num_experts: int, width: int) -> None:
        """Raise AdapterError where an expert is not of the size that the model's config says."""
        shapes = [piece.shape for piece in self._pieces[layer, expert]]
        if expert >= num_experts or not any(width in shape for shape in shapes):
            raise AdapterError(
                f"{self.folder} is damaged: config.json has {num_experts} experts of width {width} in layer {layer}, "
                f"expert {expert} is of {' and '.join(map(str, shapes))}"
            )

    @property
    def has_checksums(self) -> bool:
        """Whether damage is noticed when an expert is read."""
        return bool(self._checksums)

    @property
    def keys(self) -> list[tuple[int, int]]:
        return sorted(self._pieces)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """An expert's tensors, by name.

        Raises:
            AdapterError: the file is gone, cut off, or not what its checksum says.
        """
        made, check = {}, 0
        for piece in self._pieces[layer, expert]:
            try:
                data = _read(piece.file, piece.start, piece.size, direct=self.direct)
            except OSError as error:
                raise AdapterError(
                    f"expert {expert} of layer {layer} cannot be read from {piece.file}: {error}"
                ) from None
            check = zlib.crc32(data, check)
            held = torch.frombuffer(data, dtype=piece.dtype) if piece.size else torch.empty(0, dtype=piece.dtype)
            made[piece.name] = held.view(piece.shape)
        wanted = self._checksums.get(f"{layer} {expert}")
        if wanted is not None and wanted != check:
            raise AdapterError(f"expert {expert} of layer {layer} is damaged in {self._pieces[layer, expert][0].file}")
        return made

    def checksums(self) -> dict[str, int]:
        """Of all experts, as they lie there now; `write_checksums` keeps them."""
        found = {}
        for layer, expert in self.keys:
            check = 0
            for piece in self._pieces[layer, expert]:
                check = zlib.crc32(_read(piece.file, piece.start, piece.size, direct=False), check)
            found[f"{layer} {expert}"] = check
        return found


def write_checksums(folder: str | Path, banks: list[str]) -> None:
    """Write a CRC-32 of each expert beside the weights, for reading to be held to.

    Args:
        folder: of a converted model.
        banks: the names of its bank modules, in the order of the layers: "model.layers.0.mlp.experts" …
    """
    folder = Path(folder)
    text = json.dumps(ExpertFiles(folder, banks, direct=False).checksums())
    part = folder / f"{CHECKSUMS}.part"
    part.write_text(text)
    part.replace(folder / CHECKSUMS)


def _checksums(folder: Path) -> dict[str, int]:
    file = folder / CHECKSUMS
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (OSError, ValueError, TypeError):
        raise AdapterError(f"{file} is damaged: convert the model again") from None


def _weights(folder: Path) -> list[Path]:
    """The files that Transformers reads a model of: one, or those that an index names, and no others beside them."""
    if (file := folder / SAFE_WEIGHTS_NAME).is_file():
        return [file]
    try:
        named = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AdapterError(
            f"{folder / SAFE_WEIGHTS_INDEX_NAME} is damaged: restore it, or save the model again"
        ) from None
    return sorted({folder / name for name in named})


def _tensors(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Every tensor of a folder's model: its file, where the data begins there, its entry."""
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in _weights(folder):
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _LONGEST_HEADER + 1
            if length > _LONGEST_HEADER:
                raise AdapterError(f"{file} is no safetensors file")
            try:
                entries = json.loads(stream.read(length))
            except ValueError:
                raise AdapterError(f"{file} is damaged: its header cannot be read") from None
        if not isinstance(entries, dict):
            raise AdapterError(f"{file} is damaged: its header cannot be read")
        entries.pop("__metadata__", None)
        found |= {name: (file, 8 + length, entry) for name, entry in entries.items()}
    return found


def unmap(model: nn.Module, folder: Path) -> None:
    """Give a model that was loaded from a folder weights in memory of their own, which follow no file any more.

    They are read anew, one by one: copied out of the mapped file, they would be in memory twice for a while.
    """
    found = _tensors(folder)
    for name, parameter in model.named_parameters():
        file, offset, entry = found.get(name, (folder, 0, {}))
        if _DTYPES.get(entry.get("dtype", "")) != parameter.dtype:
            parameter.data = parameter.data.clone()
            continue
        begin, end = entry["data_offsets"]
        try:
            data = _read(file, offset + begin, end - begin, direct=False)
        except OSError as error:
            raise AdapterError(f"{name} cannot be read from {file}: {error}") from None
        parameter.data = torch.frombuffer(data, dtype=parameter.dtype).view(parameter.shape)


def _read(file: Path, start: int, size: int, *, direct: bool) -> memoryview:
    """Bytes of a file, in memory of their own; raises OSError where there are fewer."""
    if not size:
        return memoryview(b"")
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    try:
        descriptor = os.open(file, os.O_RDONLY | flag)
    except OSError:
        if not flag:
            raise
        return _read(file, start, size, direct=False)
    try:
        begin = start // BLOCK * BLOCK
        wanted = start - begin + size
        buffer = mmap.mmap(-1, -(-wanted // BLOCK) * BLOCK)
        view, got = memoryview(buffer), 0
        while got < wanted:
            try:
                count = os.preadv(descriptor, [view[got:]], begin + got)
            except OSError as error:
                if not flag or error.errno != errno.EINVAL:
                    raise
                return _read(file, start, size, direct=False)  # opened so, and yet not read so
            if count == 0:
                raise OSError(f"it ends {wanted - got:,} bytes early")
            got += count
        return view[start - begin : wanted]
    finally:
        os.close(descriptor)
