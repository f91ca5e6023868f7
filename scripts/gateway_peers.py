"""Other gateways, for gateway_speed.py: `python scripts/gateway_peers.py FOLDER [backend=http://127.0.0.1:8000/v1]`.

Installs LiteLLM's proxy, Portkey's gateway and NeMo Switchyard, each in an environment of its own under FOLDER, writes
what they read for one backend that has a model `mock`, and prints how each is started and asked. What is there stays.
It needs Python's venv, and npm with a node before 24.

Each is one server process on 127.0.0.1 that logs no request and sends nothing out. LiteLLM has a master key, the most
it knows without a database: no budget, no trace. Portkey has no keys of its own, is told in headers where a request
goes, and would listen on every address: a file that node loads first holds it to this one. Switchyard has no keys
either; its server is the native one of the wheel, with a route that passes a request on.

Two latencies of streams are waits, no work: Portkey sleeps 25 ms before the first part of each, and Switchyard leaves
TCP_NODELAY unset, so that a client on the same machine that delays its acknowledgements gets the rest 40 ms late.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = {"litellm": "litellm[proxy]==1.108.7", "portkey": "@portkey-ai/gateway@1.15.2",
            "switchyard": "nemo-switchyard==0.3.0"}  # fmt: skip
PEERS = tuple(PACKAGES)
BESIDE = ("@hono/node-server@1.13.5", "@hono/node-ws@1.2.0")
"""Of what Portkey takes, what its own lock file has: under newer ones a stream is answered 500 (its issue 1389)."""
KEY = "sk-a-key-of-the-speed-run"

LOOPBACK = """const { Server } = require("net"), listen = Server.prototype.listen
Server.prototype.listen = function (port, host, then) { return listen.call(this, port, "127.0.0.1", then) }
"""
ROUTES = """schema_version = 1
[llm_clients.mock]
format = "openai_chat"
base_url = "{backend}"
[targets.mock]
id = "mock"
llm_client = "mock"
[routes.mock]
id = "mock"
type = "passthrough"
target = "mock"
"""
SERVE = """import signal, sys
from switchyard_rust.server import Server
server = Server(sys.argv[1], int(sys.argv[2]))
signal.pause()
"""


def version(folder: Path, name: str) -> str | None:
    """What is installed; pip and npm put the package itself in place last."""
    package = PACKAGES[name]
    if name == "portkey":
        file = folder / name / "node_modules" / package.rpartition("@")[0] / "package.json"
        return json.loads(file.read_text())["version"] if file.exists() else None
    site = [str(path) for path in (folder / name).glob("lib/python*/site-packages")]
    found = importlib.metadata.distributions(name=package.split("==")[0].split("[")[0], path=site)
    return next((each.version for each in found), None)


def install(folder: Path) -> None:
    for name, package in PACKAGES.items():
        place = folder / name
        if version(folder, name) == package.replace("==", "@").rpartition("@")[2]:
            continue
        place.mkdir(parents=True, exist_ok=True)
        if name == "portkey":
            options = ("--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
            subprocess.run(["npm", "install", *options, "--prefix", place, package, *BESIDE], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            subprocess.run([place / "bin" / "pip", "install", "--quiet", package], check=True)


def configure(folder: Path, backend: str) -> None:
    told = {"model": "openai/mock", "api_base": backend, "api_key": "none"}
    config = {"model_list": [{"model_name": "mock", "litellm_params": told}]}
    (folder / "litellm" / "config.yaml").write_text(json.dumps(config))
    (folder / "portkey" / "loopback.cjs").write_text(LOOPBACK)
    (folder / "switchyard" / "routes.toml").write_text(ROUTES.format(backend=backend))
    (folder / "switchyard" / "serve.py").write_text(SERVE)


def command(folder: Path, name: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Arguments and the whole environment: none of ours, with its paths and other keys."""
    place = folder.resolve() / name
    kept = {"PATH": os.environ["PATH"], "HOME": str(place)}
    if name == "litellm":
        local = ("MODEL_COST_MAP", "ANTHROPIC_BETA_HEADERS", "BLOG_POSTS", "AUTOROUTER_PRESETS")
        own = {f"LITELLM_LOCAL_{what}": "True" for what in local}
        own |= {"LITELLM_MASTER_KEY": KEY, "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
        where = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        return [str(place / "bin" / "litellm"), "--config", str(place / "config.yaml"), *where], kept | own
    if name == "portkey":
        server = place / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        first = ["node", "--require", str(place / "loopback.cjs")]
        return [*first, str(server), f"--port={port}", "--headless"], kept | {"NODE_ENV": "production"}
    own = {"RUST_LOG": "warn", "OTEL_SDK_DISABLED": "true"}
    return [*(str(place / file) for file in ("bin/python", "serve.py", "routes.toml")), str(port)], kept | own


def headers(name: str, backend: str) -> dict[str, str]:
    """What a request says beside its body."""
    if name == "portkey":
        return {"x-portkey-provider": "openai", "x-portkey-custom-host": backend, "Authorization": "Bearer none"}
    return {"Authorization": f"Bearer {KEY}"} if name == "litellm" else {}


def main(folder: str, backend: str = "http://127.0.0.1:8000/v1") -> None:
    place = Path(folder)
    install(place)
    configure(place, backend)
    for i, name in enumerate(PEERS):
        arguments, environment = command(place, name, 8001 + i)
        own = [shlex.quote(f"{key}={value}") for key, value in environment.items() if key != "PATH"]
        print(name, version(place, name))
        print("  env -i", 'PATH="$PATH"', *own, shlex.join(arguments))
        print(*(f"  {key}: {value}" for key, value in headers(name, backend).items()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], *(argument.removeprefix("backend=") for argument in sys.argv[2:3]))
