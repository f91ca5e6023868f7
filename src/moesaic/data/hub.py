"""The hub, where there is a way to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlparse


@cache
def unreachable() -> bool:
    """Whether the hub's name leads nowhere from here, so that only what was fetched before can be had.

    Libraries ask it again and again, for half a minute, before they say so. A proxy looks names up itself.
    """
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return False
    host = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


@contextmanager
def fetched_alone() -> Iterator[None]:
    """Have `datasets` look for nothing on a hub that cannot be reached, but among what was fetched before."""
    if not unreachable():
        yield
        return
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
