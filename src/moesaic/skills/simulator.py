"""MuJoCo, imported once, whatever OpenGL the machine has: only pictures need any."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from typing import Any

from moesaic.errors import ConfigError, MissingDependency

OFF = "disabled"
BACKENDS = {"egl", "osmesa", "glx", "glfw", "wgl", "cgl"}
_ALSO = {"", "disable", "off", "false", "0", "enable", "enabled", "on", "true", "1"}


@cache
def needed() -> Any:
    """MuJoCo.

    Raises:
        ConfigError: MUJOCO_GL is nothing that MuJoCo knows.
        MissingDependency: the extra `[skills]` is not installed.
    """
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # it is read when MuJoCo is first imported
    asked = os.environ.get("MUJOCO_GL", "").lower().strip()
    if asked not in {OFF, *BACKENDS, *_ALSO}:
        raise ConfigError(f"MUJOCO_GL={asked} is no way to draw; known: {', '.join(sorted({OFF, *BACKENDS}))}")
    try:
        return _imported()
    except ImportError:
        raise MissingDependency("mujoco", "skills") from None
    except Exception:  # whatever a backend without its library makes
        for name in [own for own in sys.modules if own.partition(".")[0] == "mujoco"]:
            del sys.modules[name]
        os.environ["MUJOCO_GL"] = OFF
        return _imported()


def _imported() -> Any:
    import_module("mujoco.rollout")
    return sys.modules["mujoco"]
