"""N bodies that do one skill or task, as a Gymnasium `VectorEnv`; `gym.make_vec("moesaic/MiniHumanoid-Walk-v0", 256)`.

An action (d,) is an offset of servo targets from the default pose in units of the body's `action_scale`, within 18;
what is seen is in `observing`. All rows of random numbers are an environment's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from moesaic.errors import ConfigError
from moesaic.skills.body import Body, load_body
from moesaic.skills.chance import Chance, seeds_of
from moesaic.skills.moment import PERIOD, TOUCHES, Moment
from moesaic.skills.observing import LIMIT, Senses
from moesaic.skills.physics import Physics, Readings, Rollouts
from moesaic.skills.rewards import norm
from moesaic.skills.tasks import find

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Singles = NDArray[np.float32]
PUSH_EVERY, PUSH = 4.0, 0.2
"""Seconds, and m/s at most."""
ACTION_NOISE = 0.02
FRICTION, MASS = (-0.9, 1.0), 0.1
"""Randomised: friction of all that touches, and the base's mass, by these shares (published: 5 kg of H1's 47)."""
_KEPT = ("_action", "_action_before", "_action_earlier", "_goal", "taken", "_air", "_standing", "_pushed", "_over")


class SkillEnv(VectorEnv[Any, Any, Any]):
    """N copies of a body at one skill or task.

    Args:
        task: of `moesaic.skills.tasks`.
        body: a built-in body, or a manifest's path.
        threads: of the simulator; 0 steps on the caller's.
        autoreset: next_step (Gymnasium's default) or same_step (what PPO here and Stable-Baselines3 take).
        randomise: friction, mass, pushes, delayed and noisy actions, noisy observations: 0 for none, 1 for as much as
            published.
        seconds: of an episode; the task's own where None.
        physics: another simulator in place of MuJoCo's, made from (body, task, num_envs).

    Raises:
        ConfigError: no such task or body, or a number out of its range.
    """

    def __init__(
        self, task: str = "walk", body: str | Body = "mini_humanoid", num_envs: int = 1, *, threads: int = 0,
        autoreset: str = "next_step", randomise: float = 0.3, seconds: float | None = None,
        physics: Callable[[Body, Any, int], Physics] | None = None, render_mode: str | None = None,
    ) -> None:  # fmt: skip
        modes = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP}
        if autoreset not in modes:
            raise ConfigError(f"autoreset={autoreset}; known: {', '.join(modes)}")
        if not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ConfigError(f"num_envs={num_envs} must be at least 1, a whole number")
        if threads < 0 or not (seconds is None or 0 < seconds < 1e6):
            raise ConfigError(f"threads={threads} must be at least 0, and seconds={seconds} above 0")
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode={render_mode}; known: rgb_array")
        if not 0 <= randomise <= 1:
            raise ConfigError(f"randomise={randomise} must be within 0 and 1")
        self.body = body if isinstance(body, Body) else load_body(body)
        self.task = find(task)(self.body)
        self.name, self.num_envs, self.randomise = task, num_envs, randomise
        self.metadata = {"autoreset_mode": modes[autoreset], "render_modes": ["rgb_array"]}
        self._same_step = autoreset == "same_step"
        self.render_mode = render_mode
        self._all = np.arange(num_envs)
        low, high = self.task.masses or (0.0, 0.0)
        self._usual, self._thing = np.array([1.0, 1.0, (low + high) / 2]), ((low - high) / 2, (high - low) / 2)
        self._traits = np.tile(self._usual, (num_envs, 1))
        self.physics = physics(self.body, self.task, num_envs) if physics else self._mujoco(threads)
        self.seconds = self.task.seconds if seconds is None else seconds
        self.steps = max(round(self.seconds / self.physics.dt), 1)
        self.every = max(round((self.task.every or 1e9) / self.physics.dt), 1)
        """Control steps after which another goal is drawn."""
        self._push_every = max(round(PUSH_EVERY / self.physics.dt), 1)
        self.senses = Senses(self.body, self.task)
        self._default = self.senses.default
        self.weight = self.body.rest.weight
        self._lay()
        self.diverged = 0
        """Environments that were begun anew because their numbers were none."""
        self._camera: Any = None
        self.measuring = False
        """Whether `errors`, by name (N,), are taken in every step, before another goal is drawn."""
        self.errors: dict[str, Floats] = {}
        self.parts: dict[str, Floats] = {}
        """The last reward's terms, (N,) each."""
        self._chance = Chance(range(num_envs))
        self._begun = False

    def _mujoco(self, threads: int) -> Physics:
        task = self.task
        return Rollouts(
            self.body, self.num_envs, scene=task.scene, objects=task.objects, threads=threads,
            alike=not self.randomise,
        )  # fmt: skip

    def _lay(self) -> None:
        """Sizes, spaces, and room for what is remembered from step to step."""
        n, d, seen = self.num_envs, self.body.dim, self.senses.command_dim + self.senses.shared_dim
        self.single_observation_space = gym.spaces.Box(-LIMIT, LIMIT, (seen,), np.float32)
        self.single_action_space = gym.spaces.Box(-LIMIT, LIMIT, (d,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self._action, self._action_before, self._action_earlier = np.zeros((3, n, d))
        self._goal = np.zeros((n, self.task.goal_dim))
        self.taken = np.zeros(n, dtype=np.int64)
        self._air = np.zeros((n, 2))
        self._standing = np.ones((n, 2), dtype=bool)
        self._pushed = np.zeros((n, 3))
        self._over = np.zeros(n, dtype=bool)
        self._seen: tuple[Singles, Singles] | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Singles, dict[str, Any]]:
        """Begin all episodes; or, by `options={"reset_mask": (N,) bool}`, some."""
        mask = (options or {}).get("reset_mask")
        if mask is not None and np.shape(mask) != (self.num_envs,):
            raise ConfigError(f"reset_mask is {np.shape(mask)}, and must be ({self.num_envs},)")
        if mask is not None and not self._begun:
            raise ConfigError("the first reset() is of all environments: leave reset_mask out")
        if seed is not None or not self._begun:
            self._chance = Chance(seeds_of(seed, self.num_envs))
            if self.randomise:
                ranges = (FRICTION, (-MASS, MASS), self._thing)
                drawn = np.concatenate([self._chance.uniform(self._all, 1, *r) for r in ranges], axis=1)
                self._traits = self._usual + self.randomise * drawn
                self._vary()
            self._begun = True
        rows = self._all if mask is None else np.flatnonzero(mask)
        if len(rows):
            self._place(rows)
            self._over[rows] = False
            self._now = self.physics.read()
        if self._seen is None or mask is None:
            self._seen = self._look(self._all)
        elif len(rows):
            self._seen[0][rows], self._seen[1][rows] = self._look(rows)
        observed, privileged = (held.copy() for held in self._seen)
        return observed, {"privileged": privileged}

    def _vary(self) -> None:
        """Give bodies the friction and the masses that were drawn for them."""
        for row, (friction, mass, thing) in enumerate(self._traits.tolist() if self.randomise else ()):
            self.physics.vary(row, friction, mass, thing if self.task.masses else None)

    def _place(self, rows: NDArray[np.int64]) -> None:
        """Put some bodies where an episode begins, and ask something of them."""
        spread = 0.1 * self._chance.uniform(rows, self.body.dim, -1, 1)
        at = np.zeros((len(rows), 3))
        at[:, 2] = self.body.base_height + 0.005
        objects = self.task.begin(self._chance, rows)
        self.physics.place(rows, self._default + spread, at, objects)
        self._goal[rows] = self.task.draw(self._chance, rows, objects)
        for held in (self._action, self._action_before, self._action_earlier, self._air, self._pushed, self.taken):
            held[rows] = 0
        self._standing[rows] = True

    def step(self, actions: Singles) -> tuple[Singles, Floats, Flags, Flags, dict[str, Any]]:
        """One control step. Actions that are no numbers begin their environments anew, as physics that diverges does.

        Raises:
            ConfigError: the actions are of another shape, or nothing was reset yet.
        """
        given = np.asarray(actions, dtype=np.float64)
        if not self._begun:
            raise ConfigError("reset() comes before step()")
        if given.shape != self._action.shape:
            raise ConfigError(f"actions are {given.shape}, and must be {self._action.shape}")
        lost = ~np.isfinite(given.sum(axis=1))
        diverged = self._move(np.clip(np.where(lost[:, None], 0.0, given), -LIMIT, LIMIT))
        again = self._over
        lost = (lost | diverged) & ~again
        if (anew := again | lost).any():
            self._place(np.flatnonzero(anew))
        self.taken += ~again
        before, self._now = self._now, self.physics.read()
        rewards, self.parts = self.task.reward(self._moment(before))
        rewards = np.where(anew, 0.0, rewards)
        self.last, self.succeeded = self._now, self.task.ended(self._now, self._goal) & ~anew
        ended = lost | (~again & self._fallen())
        late = ~ended & ((self.taken >= self.steps) | self.succeeded)
        self.diverged += int(lost.sum())
        if self.measuring:
            self.errors = self.task.errors(self._now, self._goal)
        due = ~anew & (self.taken % self.every == 0)
        if due.any():
            self._goal[due] = self.task.draw(self._chance, np.flatnonzero(due), self._now.objects[due])
        observed, privileged = self._look(self._all)
        info: dict[str, Any] = {"privileged": privileged}
        done = ended | late
        if not self._same_step:
            self._over = done
        elif done.any():
            final = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(done):
                final[row] = observed[row].copy()
            last = {"privileged": np.where(done[:, None], privileged, 0)}
            rows = np.flatnonzero(done)
            self._place(rows)
            self._now = self.physics.read()
            observed[rows], privileged[rows] = self._look(rows)
            info |= {"final_obs": final, "_final_obs": done, "final_info": last, "_final_info": done}
        self._seen = observed.copy(), privileged.copy()  # what is handed out is the caller's
        return observed, rewards, ended, late, info

    def _move(self, given: Floats) -> Flags:
        """Let the servos act; True for bodies that diverged."""
        if self.randomise:
            delay = self.randomise * self._chance.uniform(self._all, 1)
            given = (1 - delay) * given + delay * self._action
            given = given * (1 + self.randomise * ACTION_NOISE * self._chance.normal(self._all, self.body.dim))
            pushed = (self.taken > 0) & (self.taken % self._push_every == 0)
            if pushed.any():
                rows = np.flatnonzero(pushed)
                self._pushed[rows, :2] = self._chance.uniform(rows, 2, -PUSH, PUSH) * self.randomise
                self._pushed[rows, 1] *= not self.body.planar
                self.physics.push(rows, self._pushed[rows])
        self._action_earlier, self._action_before, self._action = self._action_before, self._action, given
        return self.physics.step(self._default + self.body.action_scale * given)

    def _moment(self, before: Readings) -> Moment:
        now = self._now
        standing = norm(now.feet_force) > TOUCHES
        air = self._air + self.physics.dt
        landed = standing & ~self._standing
        self._air, self._standing = np.where(standing, 0.0, air), standing
        return Moment(
            self.body, self.physics.dt, self.weight, now, before, self._action, self._action_before,
            self._action_earlier, self._goal, np.sin(self._angle()), standing, air, landed,
        )  # fmt: skip

    def _angle(self) -> Floats:
        """Of the gait's clock, (N,) rad."""
        return np.asarray((2 * np.pi * self.physics.dt / PERIOD) * self.taken, dtype=np.float64)

    def _fallen(self) -> Flags:
        leaning = np.abs(self._now.euler[:, :2]).max(axis=1) > self.body.falls_beyond
        return leaning | (self._now.position[:, 2] < self.body.falls_below)

    def _look(self, rows: NDArray[np.int64]) -> tuple[Singles, Singles]:
        """What policies of some bodies (n,) see, and their critics. Noise is drawn for these alone."""
        now, pick = (self._now, slice(None)) if rows is self._all else (self._now.of(rows), rows)
        plain = self.senses.plain(now, self._goal[pick], self._action[pick], self._angle()[pick])
        pushed = self._pushed[pick][:, self.task.axes]
        privileged = self.senses.privileged(plain, now, pushed, self._traits[pick], self._standing[pick])
        return self.senses.measured(plain, self.randomise, self._chance, rows), privileged

    def state(self) -> dict[str, NDArray[Any]]:
        """All that what comes next depends on, as arrays; `restore` takes it back."""
        held = {name.lstrip("_"): getattr(self, name).copy() for name in (*_KEPT, "_traits")}
        return {
            **held,
            "physics": self.physics.state(),
            "seeds": self._chance.seeds,
            "drawn": self._chance.drawn.copy(),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from `state`: the next step gives what it would have given.

        Raises:
            ConfigError: it is of another task or body, or of so many environments that others are here.
        """
        for name, own in self.state().items():
            if np.shape(state[name]) != own.shape:
                raise ConfigError(f"{name} is {np.shape(state[name])}, and here {own.shape}: a state of something else")
        for name in (*_KEPT, "_traits"):
            setattr(self, name, state[name.lstrip("_")].copy())
        self._chance.seeds, self._chance.drawn = state["seeds"].copy(), state["drawn"].copy()
        self._vary()
        self.physics.restore(state["physics"])
        self._begun, self._now, self._seen = True, self.physics.read(), None

    @property
    def readings(self) -> Readings:
        """All bodies as they are."""
        return self._now

    def frame(self, row: int = 0, *, stick: bool = False) -> NDArray[np.uint8]:
        """A picture (height, width, 3) of one body. Raises ConfigError where the simulator has nothing to show."""
        if not isinstance(self.physics, Rollouts):
            raise ConfigError("pictures are taken of MuJoCo's bodies alone")
        if not self._begun:
            raise ConfigError("reset() comes before a picture")
        from moesaic.skills.pictures import Camera

        model, data = self.physics.data(row)
        if self._camera is None or self._camera.stick != stick:
            self._camera = Camera(model, self.body.base, stick=stick)
        now, goal = self._now.of(np.array([row])), self._goal[row]
        errors = ", ".join(f"{name} {found[0]:.2f} off" for name, found in self.task.errors(now, goal[None]).items())
        said = f"{self.taken[row] * self.physics.dt:.1f} s", self.task.asked(goal), errors
        return self._camera.frame(data, self.task.marks(now, goal), "   ".join(filter(None, said)))

    def render(self) -> Any:
        """One picture an environment, where `render_mode` is rgb_array."""
        return tuple(self.frame(row) for row in range(self.num_envs)) if self.render_mode else None

    def close_extras(self, **kwargs: Any) -> None:
        self.physics.close()


def resets_in_step(env: Any, whose: str) -> SkillEnv:
    """The environment. Raises ConfigError unless it is a `SkillEnv` that resets in the same step, as `whose` do."""
    if not isinstance(env, SkillEnv) or env.metadata["autoreset_mode"] is not AutoresetMode.SAME_STEP:
        raise ConfigError(f'{whose} resets in the same step: SkillEnv(…, autoreset="same_step")')
    return env
