"""Printing: tables for people, JSON for machines."""

import json
import sys
from typing import Any


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def show(*parts: Any) -> None:
    """Rich tables and texts on stdout, wide where that is no terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part)
