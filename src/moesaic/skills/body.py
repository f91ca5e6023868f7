"""Bodies: an MJCF, and a manifest that says what its parts are to a policy.

Two are built in, `mini_humanoid` (planar, 10 joints) and `humanoid` (19 joints in the order of Unitree's H1); any other
is a YAML file with the same keys beside its MJCF.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, first_line, path_of, suggest
from moesaic.runs.settings import build, read_yaml
from moesaic.skills.simulator import needed

if TYPE_CHECKING:
    import mujoco

Floats = NDArray[np.float64]
BODIES = Path(__file__).parent / "bodies"
WILD, SINKS = 20.0, 0.1
"""Of a body that should stand still: rad/s, and the share of its height by which it may sink or rise."""
LONGEST = 1000
PER_JOINT = ("kp", "kd", "torque", "default")
_CONTRACT = ("joints", *PER_JOINT, "decimation", "action_scale")
_FREE, _PLANE, _AXES = [0], [2, 2, 3], [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
"""MuJoCo's kinds of joints of a base in space, and of one in the plane (slide, slide, hinge) with their axes."""


@dataclass(frozen=True)
class Rest:
    """A body that stands: `feet` and `hands` (2, 3), m, how high its feet are, and what it weighs, N."""

    feet: Floats
    hands: Floats
    foot_height: float
    weight: float


@dataclass
class Body:
    """A body: the order of its joints, their servos, how it stands, and which of its parts do what.

    Attributes:
        mjcf: its file; a relative one lies beside the manifest.
        joints: names of the d hinges that are driven, in the order of actions.
        kp, kd, torque: servo gains (Nm/rad, Nm s/rad) and largest torque (Nm), by joint.
        default: angles that it stands with, rad; an action is an offset from them in units of `action_scale` rad.
        base, base_height: the body at the root (a free joint, or two slides and a hinge), and its height standing, m.
        feet, hands: two bodies each, left first.
        hips, knees, ankles: numbers of the joints that bend forward, left first.
        upper, sway: numbers of the joints above the hips, and of the hips' yaw and roll.
        decimation: physics steps in a control step.
        falls_below, falls_beyond: an episode ends with the base lower than this, m, or tilted by more, rad.
        foot_distance: least and most between the feet sideways, m.
    """

    mjcf: str
    joints: list[str]
    kp: list[float]
    kd: list[float]
    torque: list[float]
    default: list[float]
    base: str
    base_height: float
    feet: list[str]
    hands: list[str]
    hips: list[int]
    knees: list[int]
    ankles: list[int]
    upper: list[int]
    sway: list[int] = field(default_factory=list)
    decimation: int = 10
    action_scale: float = 0.25
    falls_below: float = 0.3
    falls_beyond: float = 1.0
    foot_distance: list[float] = field(default_factory=lambda: [0.2, 0.5])

    @property
    def dim(self) -> int:
        """d, the joints that are driven."""
        return len(self.joints)

    def contract(self) -> dict[str, Any]:
        """What a policy relies on. A skill moves a body that has the same."""
        return {name: getattr(self, name) for name in _CONTRACT} | {"dt": self.dt}

    def beyond(self) -> dict[str, Any]:
        """What else makes it the body that it is: the rest of its manifest, and a hash of its MJCF."""
        spec = self._spec()
        spec.compile()
        text = re.sub("<!--.*?-->", "", spec.to_xml(), flags=re.DOTALL)
        rest = {name: value for name, value in asdict(self).items() if name not in _CONTRACT}
        return {**rest, "mjcf": hashlib.sha256(text.encode()).hexdigest()[:12]}

    @cached_property
    def plain(self) -> mujoco.MjModel:
        """Its physics with nothing beside it."""
        return self.model()

    @cached_property
    def dt(self) -> float:
        """Seconds of a control step."""
        return round(float(self.plain.opt.timestep) * self.decimation, 9)

    @cached_property
    def planar(self) -> bool:
        """Whether it lives in x and z alone."""
        model = self.plain
        return bool(model.jnt_type[model.body(self.base).jntadr[0]] != _FREE[0])

    @cached_property
    def rest(self) -> Rest:
        """Where feet and hands are when it stands at the origin."""
        mujoco = needed()
        model = self.plain
        data = self._standing(model)
        mujoco.mj_forward(model, data)
        at = data.sensordata.reshape(-1, 3)
        return Rest(at[0:2].copy(), at[2:4].copy(), float(at[0:2, 2].mean()), 9.81 * float(model.body_mass.sum()))

    def _standing(self, model: mujoco.MjModel) -> mujoco.MjData:
        """It in its default pose, at rest, at its height."""
        data = needed().MjData(model)
        for name, angle in zip(self.joints, self.default, strict=True):
            data.joint(name).qpos = angle
        root = model.joint(int(model.body(self.base).jntadr[0]))
        height = int(root.qposadr[0]) + (1 if self.planar else 2)
        data.qpos[height] = self.base_height - (model.body(self.base).pos[2] if self.planar else 0)
        return data

    def fault(self) -> str:
        """What keeps it from standing in its default pose for half a second; empty where nothing does."""
        mujoco = needed()
        model = self.model()
        data = self._standing(model)
        data.ctrl[:] = self.default
        for _ in range(round(0.5 / model.opt.timestep)):
            mujoco.mj_step(model, data)
        place = data.body(self.base).xpos
        if not np.isfinite(data.qvel).all() or np.abs(data.qvel).max() > WILD:
            return "its servos are unstable: a smaller timestep in the MJCF, or lower kp or higher kd"
        if abs(place[2] - self.base_height) > SINKS * self.base_height:
            return f"its base is at {place[2]:.2f} m after half a second: gains, default and base_height must fit"
        return ""

    @property
    def foot_height(self) -> float:
        return self.rest.foot_height

    def model(self, scene: Callable[[mujoco.MjSpec], None] | None = None) -> mujoco.MjModel:
        """Its physics, with servos and sensors, and whatever `scene` puts beside it.

        Sensors, in this order: positions of both feet and hands, velocities of the feet, forces on the feet (3 each).

        Raises:
            ConfigError: the MJCF cannot be read, or lacks what the manifest names.
        """
        spec = self._spec()
        try:
            if scene is not None:
                scene(spec)
            made = spec.compile()
        except ValueError as error:
            beside = "" if scene is None else " with what the task puts beside it"
            raise ConfigError(f"{self.mjcf} does not compile{beside}: {first_line(error)}") from None
        self._check_root(made)
        for name, angle in zip(self.joints, self.default, strict=True):
            joint = made.joint(name)
            if made.jnt_limited[joint.id] and not joint.range[0] <= angle <= joint.range[1]:
                low, high = joint.range
                raise ConfigError(
                    f"{self.mjcf}: {name} stands at {angle:g} rad, outside its range of {low:.3g} to {high:.3g} "
                    '(MJCF is in degrees unless its compiler says angle="radian")'
                )
        made.opt.disableflags |= needed().mjtDisableBit.mjDSBL_AUTORESET  # what diverges is to be seen
        if not 0 < made.opt.timestep < 0.1:
            raise ConfigError(f"{self.mjcf}: a timestep of {made.opt.timestep:g} s, and bodies take a few ms")
        return made

    def _spec(self) -> mujoco.MjSpec:
        """Its MJCF with servos, sensors and a sky."""
        mujoco = needed()
        try:
            spec = mujoco.MjSpec.from_file(self.mjcf)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.mjcf} is no MJCF that MuJoCo reads: {first_line(error)}") from None
        self._check_names(spec)
        for own in (*spec.sensors, *spec.actuators):  # an actuator's sensors go first
            spec.delete(own)
        for name, kp, kd, torque in zip(self.joints, self.kp, self.kd, self.torque, strict=True):
            servo = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            servo.set_to_position(kp, kv=kd)
            servo.forcelimited, servo.forcerange = mujoco.mjtLimited.mjLIMITED_TRUE, [-torque, torque]
        sensor, kind = mujoco.mjtSensor, mujoco.mjtObj.mjOBJ_XBODY
        for name in (*self.feet, *self.hands):
            spec.add_sensor(type=sensor.mjSENS_FRAMEPOS, objtype=kind, objname=name)
        for name in self.feet:
            spec.add_sensor(type=sensor.mjSENS_FRAMELINVEL, objtype=kind, objname=name)
        for name in self.feet:  # the net force of all contacts: data 'force', reduced to one
            spec.add_sensor(type=sensor.mjSENS_CONTACT, objtype=kind, objname=name, intprm=[2, 3, 1])
        if not any(own.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX for own in spec.textures):
            spec.add_texture(
                type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
                rgb1=[0.78, 0.86, 0.93], rgb2=[0.97, 0.96, 0.94], width=64, height=64,
            )  # fmt: skip
        return spec

    def _check_root(self, model: mujoco.MjModel) -> None:
        """Refuse a base whose joints do not say where it is in the world, in the order that is read."""
        base = model.body(self.base)
        first, count = int(base.jntadr[0]), int(base.jntnum[0])
        own = slice(first, first + count)
        kinds = model.jnt_type[own].tolist()
        moved = model.jnt_pos[own].any() or model.qpos0[model.jnt_qposadr[own]].any()
        straight = base.parentid[0] == 0 and np.allclose(base.quat, [1, 0, 0, 0]) and not moved
        if kinds != _FREE and not (kinds == _PLANE and np.allclose(model.jnt_axis[own], _AXES) and straight):
            raise ConfigError(
                f"{self.mjcf}: the base {self.base} needs a free joint alone, or, in this order, slides along 1 0 0 "
                "and 0 0 1 and a hinge about 0 1 0 through its origin, unturned in the world and without ref"
            )

    def _check_names(self, spec: mujoco.MjSpec) -> None:
        mujoco = needed()
        joints = {j.name for j in spec.joints if j.type == mujoco.mjtJoint.mjJNT_HINGE}
        bodies = {b.name for b in spec.bodies}
        for what, wanted, known in (
            ("hinge", self.joints, joints), ("body", [self.base, *self.feet, *self.hands], bodies),
        ):  # fmt: skip
            for name in wanted:
                if name not in known:
                    raise ConfigError(f"{self.mjcf} has no {what} {name}; {suggest(name, known)}")


def load_body(name: str | Path) -> Body:
    """A built-in body by name, or a manifest by path.

    Raises:
        ConfigError: there is no such body, or a key is unknown, missing, or of the wrong kind or length.
    """
    own = BODIES / f"{name}.yaml"
    file = own if own.is_file() else path_of(name)
    if not file.is_file():
        raise ConfigError(f"no body {name}: give a manifest's path, or a name; {suggest(str(name), built_in())}")
    given = read_yaml(file)
    known = {f.name: f for f in fields(Body)}
    for key in given:
        if key not in known:
            raise ConfigError(f"{file}: unknown key '{key}'; {suggest(key, known)}")
    lacking = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in given]
    if lacking:
        raise ConfigError(f"{file} lacks {', '.join(lacking)}")
    made = build(Body, given)
    made.mjcf = str(file.parent / path_of(made.mjcf))
    _check(made, file)
    return made


def built_in() -> list[str]:
    return sorted(file.stem for file in BODIES.glob("*.yaml"))


def _check(body: Body, file: Path) -> None:
    if len(set(body.joints)) < body.dim or not body.joints:
        raise ConfigError(f"{file}: joints must be names, each once")
    for name in PER_JOINT:
        if len(getattr(body, name)) != body.dim:
            raise ConfigError(f"{file}: {name} has {len(getattr(body, name))} entries for {body.dim} joints")
        if not np.isfinite(getattr(body, name)).all():
            raise ConfigError(f"{file}: {name} has an entry that is no number")
    numbers = ("base_height", "action_scale", "falls_below", "falls_beyond")
    for name in numbers:
        if not 0 < getattr(body, name) < 100:
            raise ConfigError(f"{file}: {name}={getattr(body, name)} must be above 0, in metres or radians")
    for name in ("kp", "kd", "torque"):
        if max(getattr(body, name)) > 1e6:
            raise ConfigError(f"{file}: {name} has an entry above 1e6")
    if body.decimation > LONGEST:
        raise ConfigError(f"{file}: decimation={body.decimation} must be at most {LONGEST}")
    for name in ("feet", "hands", "hips", "knees", "ankles", "foot_distance"):
        if len(getattr(body, name)) != 2:
            raise ConfigError(f"{file}: {name} must have two entries, left first")
        if len(set(getattr(body, name))) < 2:
            raise ConfigError(f"{file}: {name} names the same twice")
    if not 0 <= body.foot_distance[0] < body.foot_distance[1]:
        raise ConfigError(f"{file}: foot_distance must be a least and a larger most, m")
    for name in ("hips", "knees", "ankles", "upper", "sway"):
        for number in getattr(body, name):
            if not 0 <= number < body.dim:
                raise ConfigError(f"{file}: {name} names joint {number} of {body.dim}, counted from 0")
    if min(*body.torque, *body.kp, body.action_scale, body.base_height, body.decimation) <= 0 or min(body.kd) < 0:
        raise ConfigError(f"{file}: kp, torque, action_scale, base_height, decimation must be above 0, kd not below")
