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
    there = file.read_text(encoding="utf-8") if file.is_file() else ""
    if "import moesaic" not in there:
        start = f"{there.rstrip()}\n\n" if there.strip() else ""
        file.write_text(f"{start}{HEADING}\n\n{LOADING}", encoding="utf-8")
