"""Bodies, tasks and their environments: Gymnasium's own checks, and each environment whatever the others do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
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
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="reset_mask is"):
        env.reset(options={"reset_mask": np.array([True])})
    with pytest.raises(ConfigError, match=r"actions are \(2, 3\), and must be \(2, 10\)"):
        env.step(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="seed has 3 entries for 2"):
        env.reset(seed=[1, 2, 3])


def test_a_picture_is_taken_with_and_without_opengl() -> None:
    env = SkillEnv("box_push", num_envs=1)
    env.reset(seed=0)
    sticks = env.frame(stick=True)
    assert sticks.shape == (352, 640, 3)
    assert len(np.unique(sticks.reshape(-1, 3), axis=0)) > 4
    assert env.frame().shape == (352, 640, 3)
