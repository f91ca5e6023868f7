"""Bodies, tasks and their environments: Gymnasium's own checks, and each environment whatever the others do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import moesaic.skills
from moesaic.errors import ConfigError
from moesaic.skills.body import BODIES as PLACE
from moesaic.skills.body import load_body
from moesaic.skills.chance import Chance
from moesaic.skills.environment import SkillEnv
from moesaic.skills.tasks import SKILLS, TASKS

BODIES = ("mini_humanoid", "humanoid")


def acts(env: SkillEnv, steps: int, seed: int = 0, scale: float = 0.3) -> Any:
    chance = np.random.default_rng(seed)
    return (scale * chance.standard_normal((steps, env.num_envs, env.body.dim))).astype(np.float32)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("task", [*SKILLS, *TASKS])
def test_every_task_of_every_body_runs(task: str, body: str) -> None:
    env = SkillEnv(task, body, 3, autoreset="same_step")
    observed, info = env.reset(seed=0)
    assert env.observation_space.contains(observed)
    for action in acts(env, 30):
        observed, reward, ended, late, info = env.step(action)
        assert env.observation_space.contains(observed)
        assert np.isfinite(info["privileged"]).all()
        assert (reward >= 0).all()
        assert not (ended & late).any()
    assert {*env.parts} == {*env.task.scales}
    assert env.diverged == 0


@pytest.mark.parametrize("name", ["MiniHumanoid-FarReach", "MiniHumanoid-BoxPush", "Humanoid-Walk"])
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")
def test_gymnasium_finds_nothing_wrong(name: str) -> None:
    check_env(gym.make(f"moesaic/{name}-v0").unwrapped, skip_render_check=True)
    many = gym.make_vec(f"moesaic/{name}-v0", num_envs=3)
    assert isinstance(many, SkillEnv)
    assert many.num_envs == 3
    with pytest.raises(gym.error.NameNotFound):
        gym.make("moesaic/MiniHumanoid-Fly-v0")


def test_one_among_many_does_what_it_does_alone() -> None:
    many = SkillEnv("walk", num_envs=4, autoreset="same_step")
    alone = SkillEnv("walk", num_envs=1, autoreset="same_step")
    actions = acts(many, 120)
    first, own = many.reset(seed=[5, 6, 7, 8])[0], alone.reset(seed=7)[0]
    np.testing.assert_array_equal(first[2], own[0])
    for action in actions:
        seen, reward, ended, _, _ = many.step(action)
        one = alone.step(action[2:3])
        np.testing.assert_allclose(seen[2], one[0][0], rtol=1e-4, atol=1e-5)  # numpy rounds by a number's place
        np.testing.assert_allclose(reward[2], one[1][0], rtol=1e-4, atol=1e-6)
        assert ended[2] == one[2][0]


def test_threads_and_seeds_change_nothing_that_they_should_not() -> None:
    runs = []
    for threads, seed in ((0, 3), (2, 3), (0, 4)):
        env = SkillEnv("box_push", num_envs=5, threads=threads)
        env.reset(seed=seed)
        runs.append([env.step(action)[:4] for action in acts(env, 60)])
        env.close()
    for own, other in zip(runs[0], runs[1], strict=True):
        for a, b in zip(own, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert any((a[0] != b[0]).any() for a, b in zip(runs[0], runs[2], strict=True))


def test_both_ways_of_beginning_anew_see_the_same_episodes() -> None:
    """next_step shows an episode's last observation and begins in the step after; same_step keeps it in `final_obs`."""
    same = SkillEnv("reach", num_envs=4, autoreset="same_step", randomise=0, seconds=1.0)
    later = SkillEnv("reach", num_envs=4, autoreset="next_step", randomise=0, seconds=1.0)
    assert same.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert later.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    for env in (same, later):
        env.reset(seed=0)
    finals = 0
    for action in acts(same, same.steps, scale=0.05):
        seen, reward, ended, late, info = same.step(action)
        next_seen, next_reward, next_ended, next_late, _ = later.step(action)
        np.testing.assert_array_equal(reward, next_reward)
        np.testing.assert_array_equal(ended | late, next_ended | next_late)
        for row in np.flatnonzero(ended | late):
            finals += 1
            np.testing.assert_array_equal(info["final_obs"][row], next_seen[row])
    assert finals == 4
    assert late.all()
    begun, reward, ended, late, _ = later.step(action)
    np.testing.assert_array_equal(begun, seen)
    assert not reward.any()
    assert not (ended | late).any()


def test_a_goal_that_ends_an_episode_truncates_it() -> None:
    env = SkillEnv("football_shoot", num_envs=2, autoreset="same_step", randomise=0)
    env.reset(seed=0)
    state = env.state()
    env._goal[1, :3] = env.readings.objects[1, 0]
    _, reward, ended, late, _ = env.step(np.zeros((2, env.body.dim), dtype=np.float32))
    assert late.tolist() == env.succeeded.tolist() == [False, True]
    assert not ended.any()
    assert reward[1] > reward[0]
    env.restore(state)
    assert not env.step(np.zeros((2, env.body.dim), dtype=np.float32))[3].any()


def test_a_sync_vector_of_single_bodies_is_a_vector_of_ours() -> None:
    singles = SyncVectorEnv([lambda: gym.make("moesaic/MiniHumanoid-Reach-v0", randomise=0)] * 2)
    many = SkillEnv("reach", num_envs=2, randomise=0)
    np.testing.assert_array_equal(singles.reset(seed=4)[0], many.reset(seed=4)[0])
    for action in acts(many, 40, scale=0.1):
        np.testing.assert_array_equal(singles.step(action)[0], many.step(action)[0])


def test_what_is_no_number_is_begun_anew_and_counted_and_the_others_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    clean, hurt = (SkillEnv("walk", num_envs=50, autoreset="same_step") for _ in range(2))
    for env in (clean, hurt):
        env.reset(seed=1)
    others = np.arange(50) != 7
    for number, action in enumerate(acts(clean, 40)):
        wrong = action.copy()
        if number == 10:
            wrong[7] = np.nan
        if number == 20:
            hurt.physics._state[7] = np.nan
        seen, reward, *_ = clean.step(action)
        got, given, over, _, info = hurt.step(wrong)
        assert np.isfinite(got).all()
        assert np.isfinite(info["privileged"]).all()
        np.testing.assert_array_equal(got[others], seen[others])
        np.testing.assert_array_equal(given[others], reward[others])
        if number in (10, 20):
            assert over[7]
            assert given[7] == 0
            assert np.isfinite(info["final_obs"][7]).all()
    assert hurt.diverged == 2
    assert clean.diverged == 0
    assert not [*tmp_path.iterdir()], "MuJoCo keeps no log here"
    assert capfd.readouterr() == ("", "")


def test_a_state_that_is_restored_goes_on_bit_for_bit() -> None:
    env, other = (SkillEnv("football_shoot", num_envs=6) for _ in range(2))
    env.reset(seed=2)
    actions = acts(env, 80)
    for action in actions[:50]:
        env.step(action)
    other.restore(env.state())
    for action in actions[50:]:
        for a, b in zip(env.step(action)[:4], other.step(action)[:4], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("body", BODIES)
def test_servos_hold_a_body_where_it_stands(body: str) -> None:
    env = SkillEnv("reach", body, 1, randomise=0)
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros((1, env.body.dim)))
    now = env.readings
    assert np.abs(now.q - env.body.default).max() < 0.25
    assert now.position[0, 2] == pytest.approx(env.body.base_height, abs=0.05)
    for name in env.body.joints:
        low, high = env.physics.model.joint(name).range
        assert high - low > 0.8, "in radians"


def test_random_numbers_are_even_and_normal_and_each_streams_own() -> None:
    chance, rows = Chance([0, 1, 2**40]), np.arange(3)
    drawn = chance.uniform(rows, 20_000)
    assert np.abs(drawn.mean(axis=1) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(3, 1)]).max() < 0.03
    again = Chance([1])
    first = again.uniform(np.array([0]), 5)
    np.testing.assert_array_equal(np.concatenate([first, again.uniform(np.array([0]), 7)], 1)[0], drawn[1, :12])
    normal = chance.normal(rows, 20_001)
    assert np.abs(normal.mean()) < 0.02
    assert np.abs(normal.std() - 1) < 0.02


def own(place: Path, mjcf: tuple[str, str] = ("", ""), **manifest: Any) -> Path:
    """The planar body as a user's own, with a part of its MJCF replaced and other entries in its manifest."""
    told = yaml.safe_load((PLACE / "mini_humanoid.yaml").read_text()) | manifest
    (place / "mini_humanoid.yaml").write_text(yaml.safe_dump(told))
    text = (PLACE / "mini_humanoid.xml").read_text()
    assert mjcf[0] in text
    (place / "mini_humanoid.xml").write_text(text.replace(*mjcf, 1))
    return place / "mini_humanoid.yaml"


X, Z, PITCH = (
    '<joint name="root_x" type="slide" axis="1 0 0" armature="0" damping="0"/>',
    '<joint name="root_z" type="slide" axis="0 0 1" armature="0" damping="0"/>',
    '<joint name="root_pitch" armature="0" damping="0"/>',
)


@pytest.mark.parametrize(
    "change",
    [
        (f"{X}\n      {Z}", Z + X), ('axis="0 0 1"', 'axis="0 1 0"'), ('axis="0 0 1"', 'axis="0 0 1" ref="1"'),
        (PITCH, PITCH.replace("/>", ' axis="0 -1 0"/>')), (PITCH, PITCH.replace("/>", ' pos="0 0 0.1"/>')),
        ('name="torso" pos="0 0 0.80"', 'name="torso" pos="0 0 0.80" euler="0 0 0.5"'),
    ],
)  # fmt: skip
def test_a_planar_base_that_would_be_misread_is_refused(change: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the base torso needs a free joint alone, or, in this order"):
        load_body(own(tmp_path, change)).model()


def test_a_body_is_planar_by_its_own_base_and_takes_what_it_calls_as_it_likes(tmp_path: Path) -> None:
    aside = '<worldbody><body name="cart" pos="9 0 1"><freejoint/><geom size="0.1" mass="1"/></body>'
    sky = '<asset><texture name="sky" type="2d" builtin="flat" width="4" height="4"/></asset>'
    body = load_body(own(tmp_path, ("<worldbody>", sky + aside), hands=["left_foot", "right_foot"], upper=[]))
    assert body.planar
    for task in ("walk", "button_press", "reach"):
        env = SkillEnv(task, body)
        env.reset(seed=0)
        assert np.isfinite(env.step(np.zeros((1, 10)))[1]).all()
        assert not {"upper_body_pos", "right_arm_default"} & {*env.task.scales} or task == "reach"
    ball = '<worldbody><body name="ball"><geom size="0.1" mass="1"/></body>'
    with pytest.raises(ConfigError, match=r"with what the task puts beside it: .*repeated name 'ball'"):
        SkillEnv("football_shoot", own(tmp_path, ("<worldbody>", ball)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("joints: [left_hip, nobody]", "kp has 10 entries for 2 joints"),
        ("kp: [1, 2]", "kp has 2 entries for 10 joints"),
        ("decimatoin: 3", "unknown key 'decimatoin'; did you mean 'decimation'"),
        ("base: pelvis", "has no body pelvis"),
        ("mjcf: nothing.xml", "is no MJCF that MuJoCo reads"),
        ("hips: [0, 30]", "hips names joint 30 of 10"),
        ("feet: [left_foot]", "feet must have two entries"),
        ("feet: [left_foot, left_foot]", "feet names the same twice"),
        ("falls_below: .nan", "falls_below=nan must be above 0"),
        ("action_scale: .inf", "action_scale=inf must be above 0"),
        ("foot_distance: [5, -5]", "a least and a larger most"),
        ("joints: [root_x, b, c, d, e, f, g, h, i, j]", "has no hinge root_x"),
        ("default: [-0.4, 0.8, -0.4, -0.4, 0.8, -0.4, 0, -0.3, 0, 0.3]", "right_elbow stands at 0.3 rad, outside its"),
        ("joints: []", "joints must be names, each once"),
        ("base: world", "the base world needs a free joint alone, or, in this order"),
        ("base: left_thigh", "the base left_thigh needs a free joint alone"),
        (f"decimation: {10**18}", "decimation=1000000000000000000 must be at most 1000"),
    ],
)
def test_a_manifest_that_is_wrong_says_so(change: str, said: str, tmp_path: Path) -> None:
    place = Path(moesaic.skills.__file__).parent / "bodies"
    key = change.split(":")[0]
    kept, skips = [], False
    for line in (place / "mini_humanoid.yaml").read_text().splitlines():
        skips = line.startswith(f"{key}:") or (skips and line.startswith(" "))
        kept += [] if skips else [line]
    (tmp_path / "mini_humanoid.xml").write_text((place / "mini_humanoid.xml").read_text())
    (tmp_path / "mine.yaml").write_text("\n".join([*kept, change]))
    with pytest.raises(ConfigError, match=said):
        load_body(tmp_path / "mine.yaml").model()


def test_sensors_and_actuators_of_a_bodys_own_change_nothing(tmp_path: Path) -> None:
    for name in ("mini_humanoid.yaml", "mini_humanoid.xml"):
        shutil.copy(PLACE / name, tmp_path / name)
    model, body = tmp_path / "mini_humanoid.xml", tmp_path / "mini_humanoid.yaml"
    own = (
        '<actuator><motor name="m" joint="left_hip"/></actuator><sensor><jointpos joint="left_hip"/>'
        '<actuatorfrc actuator="m"/><framepos objtype="body" objname="torso"/></sensor></mujoco>'
    )
    model.write_text(model.read_text().replace("</mujoco>", own))
    plain, mine = SkillEnv("reach", num_envs=2), SkillEnv("reach", body, num_envs=2)
    np.testing.assert_array_equal(plain.reset(seed=1)[0], mine.reset(seed=1)[0])
    for action in acts(plain, 5):
        np.testing.assert_array_equal(plain.step(action)[0], mine.step(action)[0])
    model.write_text(model.read_text().replace('timestep="0.005"', 'timestep="0"'))
    with pytest.raises(ConfigError, match="a timestep of 0 s"):
        SkillEnv("reach", body)


def test_what_cannot_be_asked_is_refused() -> None:
    for wrong, said in (
        ({"task": "wlak"}, "did you mean 'walk'"), ({"body": "mini"}, "no body mini"),
        ({"autoreset": "never"}, "known: next_step, same_step"), ({"num_envs": 0}, "must be at least 1"),
        ({"num_envs": 2.5}, "a whole number"), ({"seconds": -5}, "above 0"), ({"threads": -1}, "at least 0"),
        ({"render_mode": "human"}, "known: rgb_array"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            SkillEnv(**wrong)
    env = SkillEnv(num_envs=2)
    with pytest.raises(ConfigError, match="comes before"):
        env.step(np.zeros((2, 10)))
    with pytest.raises(ConfigError, match="comes before a picture"):
        env.frame()
    with pytest.raises(ConfigError, match="is of all environments: leave reset_mask out"):
        env.reset(options={"reset_mask": np.array([True, False])})
    for seed in (1.5, [1, 2.0], "7", [True, 1]):
        with pytest.raises(ConfigError, match="must be a whole number"):
            env.reset(seed=seed)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="reset_mask is"):
        env.reset(options={"reset_mask": np.array([True])})
    with pytest.raises(ConfigError, match=r"actions are \(2, 3\), and must be \(2, 10\)"):
        env.step(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="seed has 3 entries for 2"):
        env.reset(seed=[1, 2, 3])


def test_no_seed_is_a_fresh_one() -> None:
    env = SkillEnv("reach", num_envs=2, randomise=0)
    seen = [env.reset(seed=seed)[0] for seed in ([5, None], [None, None], [None, None], 0)]
    assert len(np.unique(np.concatenate(seen), axis=0)) == 8


def test_what_is_handed_out_is_the_callers() -> None:
    env = SkillEnv("reach", num_envs=2, randomise=0)
    observed, info = env.reset(seed=0)
    kept, mask = observed.copy(), np.array([False, True])
    for held in (observed, info["privileged"]):
        held[:] = 7
    again, info = env.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(again[0], kept[0])
    assert not (info["privileged"][0] == 7).any()
    stepped = env.step(np.zeros((2, 10)))[0]
    kept = stepped.copy()
    stepped[:] = 7
    np.testing.assert_array_equal(env.reset(options={"reset_mask": mask})[0][0], kept[0])
    same = env.reset(options={"reset_mask": ~mask & mask})[0]
    np.testing.assert_array_equal(same[0], kept[0])


def test_a_body_alone_waits_for_its_reset() -> None:
    env = gym.make("moesaic/MiniHumanoid-Reach-v0", seconds=0.06).unwrapped
    with pytest.raises(ConfigError, match="no episode is under way"):
        env.step(np.zeros(10))
    for _ in range(2):
        env.reset(seed=0)
        assert [env.step(np.zeros(10))[3] for _ in range(3)] == [False, False, True]
        with pytest.raises(ConfigError, match="no episode is under way"):
            env.step(np.zeros(10))


def test_a_state_of_another_task_is_refused() -> None:
    walk, squat = SkillEnv("walk"), SkillEnv("squat")
    assert walk.single_observation_space == squat.single_observation_space
    walk.reset(seed=0)
    with pytest.raises(ConfigError, match=r"goal is \(1, 3\), and here \(1, 1\)"):
        squat.restore(walk.state())


@pytest.mark.parametrize(
    ("backend", "said"), [("bogus", "MUJOCO_GL=bogus is no way to draw; known: cgl, disabled, egl"), ("osmesa", "")]
)
def test_opengl_is_needed_for_pictures_alone(backend: str, said: str) -> None:
    """A backend whose library is missing fails as MuJoCo is imported, in ways of its own."""
    code = (
        "import sys, types; sys.modules['mujoco.osmesa'] = types.ModuleType('mujoco.osmesa')\n"
        "sys.modules['mujoco.osmesa'].__getattr__ = lambda name: 1 / 0\n"
        "from moesaic.skills import SkillEnv\n"
        "env = SkillEnv('reach'); env.reset(seed=0); print(env.frame().shape)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, text=True
    )
    if said:
        assert said in ran.stderr.splitlines()[-1]
    else:
        assert (ran.returncode, ran.stdout) == (0, "(352, 640, 3)\n")
        assert ran.stderr == "no OpenGL works here (MUJOCO_GL=disabled), and lines are drawn in its place\n"


def test_a_picture_is_taken_with_and_without_opengl() -> None:
    env = SkillEnv("box_push", num_envs=1)
    env.reset(seed=0)
    sticks = env.frame(stick=True)
    assert sticks.shape == (352, 640, 3)
    assert len(np.unique(sticks.reshape(-1, 3), axis=0)) > 4
    assert env.frame().shape == (352, 640, 3)
