"""What stands beside a body: things that it can move, and things that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BODY, THING, HELD = 1, 1, 2
"""Bits by which geoms collide: a body's parts and things with each other and the floor; a stand with things alone."""


def add_thing(spec: Any, name: str, *, planar: bool, kind: str, size: Sequence[float], mass: float) -> None:
    """A box (half sizes, m) or a sphere (radius) that moves freely, in its plane where the body does."""
    import mujoco

    body = spec.worldbody.add_body(name=name)
    if planar:
        for axis, what in (([1, 0, 0], "x"), ([0, 0, 1], "z")):
            body.add_joint(name=f"{name}_{what}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis)
        body.add_joint(name=f"{name}_turn", type=mujoco.mjtJoint.mjJNT_HINGE, axis=[0, 1, 0])
    else:
        body.add_freejoint()
    shape = mujoco.mjtGeom.mjGEOM_BOX if kind == "box" else mujoco.mjtGeom.mjGEOM_SPHERE
    body.add_geom(
        name=name, type=shape, size=[*size, 0, 0][:3], mass=mass, contype=THING, conaffinity=BODY | HELD,
        rgba=[0.9, 0.7, 0.2, 1],
    )  # fmt: skip


def add_block(spec: Any, name: str, *, at: Sequence[float], size: Sequence[float], holds_body: bool) -> None:
    """A box that stays (centre and half sizes, m): a wall, which holds bodies, or a stand, which holds things alone."""
    import mujoco

    spec.worldbody.add_geom(
        name=name, type=mujoco.mjtGeom.mjGEOM_BOX, pos=list(at), size=list(size),
        contype=BODY if holds_body else HELD, conaffinity=0, rgba=[0.6, 0.6, 0.65, 1],
    )  # fmt: skip
