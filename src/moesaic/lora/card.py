"""README.md of a mixture's folder says how to load it: without moesaic imported, PEFT raises a KeyError."""

from __future__ import annotations

import os
from pathlib import Path

HEADING = "## How to load it"

LOADING = """A routed mixture of LoRA. PEFT knows it once moesaic (`pip install moesaic`) is imported:

```python
import moesaic  # before the adapter is loaded
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/folder")
```

A program that does not import it loads the adapter when it is started by `python -m moesaic.with PROGRAM …`.
"""


def tell_loading(folder: str | os.PathLike[str]) -> None:
    """Say it in a folder's README.md, behind what is there, unless that says `import moesaic` already."""
    file = Path(folder) / "README.md"
    there = file.read_bytes().rstrip() if file.is_file() else b""  # a user's own, in whatever it is written
    if b"import moesaic" not in there:
        part = file.with_name(f".{file.name}.part")
        part.write_bytes(there + b"\n\n" * bool(there) + f"{HEADING}\n\n{LOADING}".encode())
        os.replace(part, file)
