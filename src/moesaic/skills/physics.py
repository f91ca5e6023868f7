"""Many bodies stepped at once: what a simulator gives, and MuJoCo's own batched stepping behind it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesaic.skills.body import Body
from moesaic.skills.simulator import needed

if TYPE_CHECKING:
    import mujoco

Floats = NDArray[np.float64]
FAR = 1e6
"""A position, an angle or a speed beyond it is of a body that diverged."""


@dataclass
class Readings:
    """N bodies after a control step, in SI units and world axes; what a planar body lacks is 0.

    Attributes:
        q, dq: (N, d) driven joints.
        position, velocity: (N, 3) of the base; `euler` (N, 3) roll, pitch, yaw; `spin` (N, 3) about its own axes.
        feet, hands: (N, 2, 3) positions; feet_velocity, feet_force: (N, 2, 3).
        torque: (N, d), as the servos gave it at the end.
        objects: (N, o, 3) positions of what a task put beside the body, objects_velocity too.
    """

    q: Floats
    dq: Floats
    position: Floats
    velocity: Floats
    euler: Floats
    spin: Floats
    feet: Floats
    hands: Floats
    feet_velocity: Floats
    feet_force: Floats
    torque: Floats
    objects: Floats
    objects_velocity: Floats

    def of(self, rows: NDArray[np.int64]) -> Readings:
        """Those of some bodies."""
        return Readings(**{part.name: getattr(self, part.name)[rows] for part in fields(self)})


class Physics(Protocol):
    """A simulator of N bodies. Another one (on a GPU, say) stands in by having this."""

    num_envs: int
    dt: float
    """Seconds of a control step."""

    def place(self, rows: NDArray[np.int64], q: Floats, position: Floats, objects: Floats) -> None:
        """Put some bodies (n,) upright and at rest: joints (n, d), the base's position (n, 3), objects (n, o, 3)."""

    def step(self, targets: Floats) -> NDArray[np.bool_]:
        """One control step towards targets (N, d); True for those that diverged, whose readings mean nothing."""

    def push(self, rows: NDArray[np.int64], velocity: Floats) -> None:
        """Add to the velocity (n, 3) of some bases."""

    def vary(self, row: int, friction: float, mass: float, thing: float | None) -> None:
        """Give a body its own friction and base mass, as factors, and the first object its mass, kg."""

    def read(self) -> Readings: ...

    def state(self) -> Floats:
        """All that the next step depends on, (N, s); `restore` takes it back, for all bodies or for some."""

    def restore(self, state: Floats) -> None: ...

    def close(self) -> None: ...


class Rollouts:
    """`Physics` by `mujoco.rollout`: bodies are stepped in C++, on `threads` threads.

    Args:
        scene: puts things beside the body; `objects` are the names of those that move, by joints of their own.
        threads: that step bodies; 0 is the caller's own.
        alike: whether all bodies have the same physics, or each what `vary` makes of it.
    """

    def __init__(
        self, body: Body, num_envs: int, *, scene: Callable[[Any], None] | None = None, objects: Sequence[str] = (),
        threads: int = 0, alike: bool = True,
    ) -> None:  # fmt: skip
        mujoco = needed()
        if mujoco.get_mju_user_warning() is None:
            mujoco.set_mju_user_warning(_warned)
        self.body, self.num_envs, self.objects = body, num_envs, list(objects)
        model = body.model(scene)
        self.model, self.models = model, [model] * num_envs
        if not alike:
            self.models = [copy.copy(model) for _ in range(num_envs)]
        self.dt = model.opt.timestep * body.decimation
        self._data = [mujoco.MjData(model) for _ in range(max(threads, 1))]
        self._pool = mujoco.rollout.Rollout(nthread=threads)
        self._spec = mujoco.mjtState.mjSTATE_CTRL.value
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        steps = body.decimation
        self._state = np.zeros((num_envs, size))
        self._states = np.zeros((num_envs, steps, size))
        self._sensors = np.zeros((num_envs, steps, model.nsensordata))
        self._control = np.zeros((num_envs, steps, model.nu))
        self._lay(mujoco, model)

    def _lay(self, mujoco: Any, model: mujoco.MjModel) -> None:
        """Find where things stand in a state: time, qpos, qvel, in this order."""
        body, nq = self.body, model.nq
        base = model.body(body.base)
        root = base.jntadr[0]
        self._planar = bool(model.jnt_type[root] != mujoco.mjtJoint.mjJNT_FREE)
        at, speed = int(model.jnt_qposadr[root]), int(model.jnt_dofadr[root])
        self._root, self._root_speed = 1 + at, 1 + nq + speed
        self._offset = np.array(base.pos) if self._planar else np.zeros(3)
        joints = [model.joint(name) for name in body.joints]
        self._q = np.array([1 + int(j.qposadr[0]) for j in joints])
        self._dq = np.array([1 + nq + int(j.dofadr[0]) for j in joints])
        self._servo = np.array([model.actuator(name).id for name in body.joints])
        slot = {}
        for name in self.objects:
            first = model.body(name).jntadr[0]
            free = model.jnt_type[first] == mujoco.mjtJoint.mjJNT_FREE
            slot[name] = (1 + int(model.jnt_qposadr[first]), 1 + nq + int(model.jnt_dofadr[first]), bool(free))
        self._slots = slot
        self._blank = np.zeros(self._state.shape[1])
        self._blank[1 : 1 + nq] = model.qpos0
        self._kp, self._kd = np.array(body.kp), np.array(body.kd)
        self._limit = np.array(body.torque)

    def place(self, rows: NDArray[np.int64], q: Floats, position: Floats, objects: Floats) -> None:
        state = np.tile(self._blank, (len(rows), 1))
        state[:, self._q] = q
        root = self._root
        if self._planar:
            state[:, root] = position[:, 0] - self._offset[0]
            state[:, root + 1] = position[:, 2] - self._offset[2]
        else:
            state[:, root : root + 3] = position
        for number, (at, _, free) in enumerate(self._slots.values()):
            if free:
                state[:, at : at + 3] = objects[:, number]
            else:
                state[:, at] = objects[:, number, 0]
                state[:, at + 1] = objects[:, number, 2]
        self._state[rows] = state
        self._control[rows] = q[:, None]
        mujoco, data, kind = needed(), self._data[0], needed().mjtState.mjSTATE_FULLPHYSICS
        for row, own in zip(rows, state, strict=True):  # sensors are read before the first step
            mujoco.mj_setState(self.models[row], data, own, kind)
            mujoco.mj_forward(self.models[row], data)
            self._sensors[row, -1] = data.sensordata

    def step(self, targets: Floats) -> NDArray[np.bool_]:
        self._control[:] = targets[:, None]
        self._pool.rollout(
            self.models, self._data, self._state, self._control, nstep=self.body.decimation, skip_checks=True,
            control_spec=self._spec, state=self._states, sensordata=self._sensors,
        )  # fmt: skip
        self._state[:] = self._states[:, -1]
        return ~(np.abs(self._state).max(axis=1) < FAR)

    def push(self, rows: NDArray[np.int64], velocity: Floats) -> None:
        at = self._root_speed
        if self._planar:
            self._state[rows, at] += velocity[:, 0]
            self._state[rows, at + 1] += velocity[:, 2]
        else:
            self._state[rows, at : at + 3] += velocity

    def read(self) -> Readings:
        state, n = self._state, self.num_envs
        sensed = self._sensors[:, -1].copy().reshape(n, -1, 3)  # the next step writes there
        q, dq = state[:, self._q], state[:, self._dq]
        targets = self._control[:, -1, self._servo]
        at, speed = self._root, self._root_speed
        if self._planar:
            position, velocity, euler, spin = np.zeros((4, n, 3))
            position[:, 0::2] = state[:, at : at + 2] + self._offset[0::2]
            velocity[:, 0::2] = state[:, speed : speed + 2]
            euler[:, 1], spin[:, 1] = state[:, at + 2], state[:, speed + 2]
        else:
            position, velocity = state[:, at : at + 3].copy(), state[:, speed : speed + 3].copy()
            euler, spin = euler_of(state[:, at + 3 : at + 7]), state[:, speed + 3 : speed + 6].copy()
        objects, moving = np.zeros((2, n, len(self._slots), 3))
        for number, (where, speed, free) in enumerate(self._slots.values()):
            axes = slice(None) if free else slice(None, None, 2)
            count = 3 if free else 2
            objects[:, number, axes] = state[:, where : where + count]
            moving[:, number, axes] = state[:, speed : speed + count]
        torque = np.clip(self._kp * (targets - q) - self._kd * dq, -self._limit, self._limit)
        return Readings(
            q=q, dq=dq, position=position, velocity=velocity, euler=euler, spin=spin, feet=sensed[:, 0:2],
            hands=sensed[:, 2:4], feet_velocity=sensed[:, 4:6], feet_force=sensed[:, 6:8], torque=torque,
            objects=objects, objects_velocity=moving,
        )  # fmt: skip

    def vary(self, row: int, friction: float, mass: float, thing: float | None) -> None:
        own, stock = self.models[row], self.model
        own.geom_friction[:, 0] = stock.geom_friction[:, 0] * friction
        _weigh(own, stock, self.body.base, mass)
        if thing is not None:
            _weigh(own, stock, self.objects[0], thing / float(stock.body(self.objects[0]).mass[0]))

    def data(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """A body as it is now, with its kinematics, for pictures; the next call overwrites it."""
        mujoco = needed()
        mujoco.mj_setState(self.models[row], self._data[0], self._state[row], mujoco.mjtState.mjSTATE_FULLPHYSICS)
        mujoco.mj_forward(self.models[row], self._data[0])
        return self.models[row], self._data[0]

    def state(self) -> Floats:
        return np.concatenate([self._state, self._sensors[:, -1], self._control[:, -1]], axis=1)

    def restore(self, state: Floats) -> None:
        sizes = np.cumsum([self._state.shape[1], self._sensors.shape[2]])
        self._state[:], self._sensors[:, -1], self._control[:, -1] = np.split(state, sizes, axis=1)

    def close(self) -> None:
        self._pool.close()


def _warned(text: str) -> None:
    """MuJoCo's warnings, which else go to stderr and into a file here. Bodies that diverge are counted as such."""
    if "simulation is unstable" not in text:
        logging.getLogger("moesaic").warning("MuJoCo: %s", text)


def _weigh(own: mujoco.MjModel, stock: mujoco.MjModel, name: str, factor: float) -> None:
    number = stock.body(name).id
    own.body_mass[number] = stock.body_mass[number] * factor
    own.body_inertia[number] = stock.body_inertia[number] * factor


def euler_of(quaternion: Floats) -> Floats:
    """Roll, pitch and yaw (n, 3), rad, of unit quaternions (n, 4) with the real part first."""
    w, x, y, z = quaternion.T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1, 1))
    return np.stack([roll, pitch, np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))], axis=1)
