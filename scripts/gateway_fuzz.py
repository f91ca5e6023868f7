"""Fuzz the gateway by its own document: `python scripts/gateway_fuzz.py [examples=100]`.

It needs schemathesis, which no extra has. A mock backend and the gateway run, each in a process of its own; every
request names the model that there is. Any answer that is a 5xx, that its schema does not describe, or that takes what
the schema forbids, is a failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from gateway_speed import KEY, free_port, started


def named(document: dict, url: str, model: str) -> dict:  # type: ignore[type-arg]
    """The document with one model for every request."""
    for path in document["paths"].values():
        if "post" in path:
            schema = path["post"]["requestBody"]["content"]["application/json"]["schema"]
            schema["properties"]["model"] = {"const": model}
    return {**document, "servers": [{"url": url}]}


def main(examples: int = 100) -> int:
    ports = {kind: free_port() for kind in ("backend", "gateway")}
    backend = f"http://127.0.0.1:{ports['backend']}/v1/chat/completions"
    url = f"http://127.0.0.1:{ports['gateway']}"
    processes = []
    try:
        for kind, port in ports.items():
            processes.append(started(kind, port, backend))
        with urllib.request.urlopen(f"{url}/openapi.json") as found:
            document = json.load(found)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "openapi.json"
            file.write_text(json.dumps(named(document, url, "mock")))
            command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file), "--url", url,
                       "--header", f"Authorization: Bearer {KEY}", "--max-examples", str(examples), "--seed", "1",
                       "--phases", "coverage,fuzzing"]  # fmt: skip
            return subprocess.run(command, cwd=folder, check=False).returncode
    finally:
        for process in processes:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main(*(int(argument.split("=")[-1]) for argument in sys.argv[1:2])))
