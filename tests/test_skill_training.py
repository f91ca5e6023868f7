"""PPO against its formulas, runs that are interrupted, and policies in other people's libraries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from moesaic.errors import AdapterError, ConfigError, MoesaicError, TrainingError
from moesaic.skills import training
from moesaic.skills.body import BODIES, load_body
from moesaic.skills.environment import SkillEnv
from moesaic.skills.looking import opened
from moesaic.skills.official import import_official
from moesaic.skills.policy import Policy, mlp
from moesaic.skills.ppo import PPO, PPOSettings, divergence, gae
from moesaic.skills.running import Look, load_run
from moesaic.skills.saving import load
from moesaic.skills.skillbench import evaluate

QUICK = ["num_envs=16", "hidden=16", "critic_hidden=16", "ppo.steps=8", "ppo.minibatches=2"]


def trained(place: Path, *more: str, blends: bool = False) -> dict[str, Any]:
    return training.train(load_run([*QUICK, f"out={place}", *more], blends=blends), progress=False)


def manifest(place: Path) -> Path:
    """A copy of the planar body, as a user's own."""
    for name in ("mini_humanoid.yaml", "mini_humanoid.xml"):
        shutil.copy(BODIES / name, place / name)
    return place / "mini_humanoid.yaml"


def stopped_after_one(self: PPO, plain: Any = PPO.iterate) -> dict[str, float]:
    if self.taken:
        raise KeyboardInterrupt
    return plain(self)


def learner(lr: float = 1e-3, **settings: Any) -> PPO:
    env = SkillEnv("reach", num_envs=8, autoreset="same_step")
    torch.manual_seed(0)
    privileged = env.reset(seed=0)[1]["privileged"].shape[1]
    size = env.single_observation_space.shape[0]
    policy = Policy(mlp([size, 8, env.body.dim]), env.body.dim, privileged, [8], 0.5)
    return PPO(env, policy, PPOSettings(steps=8, minibatches=2, lr=lr, **settings))


def test_advantages_are_their_sum() -> None:
    t, n, gamma, lam = 6, 3, 0.9, 0.8
    rewards, values = torch.randn(t, n), torch.randn(t + 1, n)
    done = (torch.rand(t, n) < 0.3).float()
    found = gae(rewards, values, done, gamma, lam)
    for row in range(n):
        for start in range(t):
            total, weight = 0.0, 1.0
            for k in range(start, t):
                going = 1 - done[k, row].item()
                delta = rewards[k, row] + gamma * values[k + 1, row] * going - values[k, row]
                total += weight * delta.item()
                weight *= gamma * lam * going
            assert found[start, row].item() == pytest.approx(total, abs=1e-5)


def test_divergence_log_probabilities_and_entropy_are_torchs() -> None:
    policy = Policy(mlp([3, 4]), 4, 5, [6])
    policy.log_std.data.normal_()
    mean, action = torch.randn(7, 4), torch.randn(7, 4)
    own = torch.distributions.Normal(mean, policy.log_std.exp())
    torch.testing.assert_close(policy.log_prob(action, mean), own.log_prob(action).sum(dim=-1))
    torch.testing.assert_close(policy.entropy(), own.entropy()[0].sum())
    other, log_std = torch.randn(7, 4), torch.randn(4)
    wanted = torch.distributions.kl_divergence(torch.distributions.Normal(other, log_std.exp()), own).sum(dim=-1).mean()
    torch.testing.assert_close(divergence(other, log_std, mean, policy.log_std), wanted)


def test_the_learning_rate_follows_the_divergence() -> None:
    ppo = learner(target_kl=0.01)
    for kl, wanted in ((0.05, 1e-3 / 1.5), (0.015, 1e-3 / 1.5), (0.001, 1e-3), (0.0, 1e-3)):
        ppo._follow(kl)
        assert ppo.lr == pytest.approx(wanted)
    for _ in range(30):
        ppo._follow(1.0)
    assert ppo.lr == 1e-5


def test_a_round_that_is_taken_up_is_the_one_that_would_have_been() -> None:
    one, other = learner(), learner()
    for _ in range(3):
        one.iterate()
    other.restore(*one.state())
    for _ in range(2):
        assert one.iterate() == other.iterate()
    for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_kept_is_an_average_over_rounds() -> None:
    for average in (0.0, 0.75):
        ppo = learner(average=average)
        begun = [p.detach().clone() for p in ppo.policy.mean.parameters()]
        rounds = []
        for _ in range(3):
            ppo.iterate()
            rounds.append([p.detach().clone() for p in ppo.policy.mean.parameters()])
        ppo.settle()
        for number, p in enumerate(ppo.policy.mean.parameters()):
            expected = average**3 * begun[number]
            for age, each in enumerate(reversed(rounds)):
                expected = expected + (1 - average) * average**age * each[number]
            torch.testing.assert_close(p.detach(), expected)


def test_time_outs_are_worth_what_the_critic_sees_last_and_falls_nothing() -> None:
    ppo = learner()
    ppo.env.steps = 4
    ppo.collect()
    assert ppo._late.any()
    assert (ppo._last[ppo._late].abs().sum(dim=-1) > 0).all()
    assert (ppo._done >= ppo._late.float()).all()


def test_numbers_that_are_none_stop_it_and_bodies_that_diverge_do_not() -> None:
    ppo = learner()
    ppo.env.physics._state[3] = np.nan
    ppo.iterate()
    assert ppo.env.diverged == 1
    assert all(torch.isfinite(p).all() for p in ppo.policy.parameters())
    ppo.policy.critic[0].weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="the loss is no number any more"):
        ppo.iterate()


def test_a_run_that_is_interrupted_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", "task=walk", "steps=1024", "every=3")
    rounds, plain = [0], PPO.iterate

    def interrupted(self: PPO) -> dict[str, float]:
        rounds[0] += 1
        if rounds[0] == 5:
            self.collect()  # in the middle of a round
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(PPO, "iterate", interrupted)
    line = ("task=walk", "steps=1024", "every=3", "overwrite=true")
    with pytest.raises(KeyboardInterrupt, match="stopped after 512 steps, which are kept"):
        trained(tmp_path / "cut", *line)
    with pytest.raises(ConfigError, match="holds an unfinished run with seed=0, now 1"):
        trained(tmp_path / "cut", *line[:-1], "seed=1")
    cut = trained(tmp_path / "cut", *line)
    assert cut["last"] == whole["last"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert len(lines[0]) == len(lines[1]) == 8
    for a, b in zip(*(load(tmp_path / n).state_dict().values() for n in ("whole", "cut")), strict=True):
        assert torch.equal(a, b)


def test_more_steps_of_a_finished_run_go_on_as_one_that_had_them_from_the_start(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "task=walk", "steps=1024")
    first = trained(tmp_path / "twice", "task=walk", "steps=512")
    with pytest.raises(ConfigError, match="holds a finished run; overwrite=true replaces it"):
        trained(tmp_path / "twice", "task=walk", "steps=512")
    with pytest.raises(ConfigError, match=r"holds a finished run with seed=0, now 1: set it back to go on"):
        trained(tmp_path / "twice", "task=walk", "steps=1024", "seed=1")
    assert (tmp_path / "twice" / "results.json").is_file(), "nothing is lost where more is refused"
    twice = trained(tmp_path / "twice", "task=walk", "steps=1024")
    assert (first["steps"], twice["steps"], twice["last"]) == (512, 1024, whole["last"])
    for a, b in zip(*(load(tmp_path / n).state_dict().values() for n in ("whole", "twice")), strict=True):
        assert torch.equal(a, b)
    page = (tmp_path / "twice" / "report.html").read_text()
    assert "Learning" in page
    assert "reward a step" in page


def test_a_blend_of_one_skill_is_told_that_it_has_nothing_to_weigh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "walk", "task=walk", "steps=128")
    trained(tmp_path / "alone", "task=far_reach", f"skills={tmp_path / 'walk'}", "steps=128", blends=True)
    assert "a blend of one skill has nothing to weigh: far_reach is for walk and reach" in caplog.text


def test_a_finished_run_that_is_replaced_goes_on_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "r"
    trained(place, "task=walk", "steps=256")
    monkeypatch.setattr(PPO, "iterate", stopped_after_one)
    with pytest.raises(KeyboardInterrupt):
        trained(place, "task=walk", "steps=256", "seed=1", "overwrite=true")
    monkeypatch.undo()
    assert not (place / "results.json").exists()
    assert not (place / "model").exists()
    assert trained(place, "task=walk", "steps=256", "seed=1", "overwrite=true")["seed"] == 1
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_another_finished_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, plain = tmp_path / "r", training.locked

    def faster(folder: Path) -> Any:
        monkeypatch.setattr(training, "locked", plain)
        trained(place, "task=walk", "steps=128")
        return plain(folder)

    monkeypatch.setattr(training, "locked", faster)
    with pytest.raises(ConfigError, match="holds a finished run"):
        trained(place, "task=walk", "steps=128", "seed=1")
    assert json.loads((place / "results.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("mini_humanoid.yaml", "action_scale: 0.4", "action_scale: 0.1", r"action_scale.*0\.4"),
        ("mini_humanoid.yaml", "falls_below: 0.35", "falls_below: 0.3", r"manifest\.falls_below=0\.35, now 0\.3"),
        ("mini_humanoid.xml", 'mass="8"', 'mass="9"', r"with manifest\.mjcf=\w+, now \w+:"),
        ("mini_humanoid.xml", 'timestep="0.005"', 'timestep="0.004"', r"relies\.dt=0\.02, now 0\.016"),
    ],
)
def test_a_body_that_changed_meanwhile_is_told(
    file: str, before: str, after: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = manifest(tmp_path)
    monkeypatch.setattr(PPO, "iterate", stopped_after_one)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "r", "task=walk", "steps=256", f"body={body}")
    monkeypatch.undo()
    part = tmp_path / file
    assert before in part.read_text()
    part.write_text(part.read_text().replace(before, after, 1))
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "r", "task=walk", "steps=256", f"body={body}")


def test_a_body_that_is_not_stable_stops_it(tmp_path: Path) -> None:
    body = manifest(tmp_path)
    lines = [line for line in body.read_text().splitlines() if not line.startswith(("kp:", "kd:", "torque:"))]
    body.write_text("\n".join([*lines, f"kp: {[1e6] * 10}", f"kd: {[1e6] * 10}", f"torque: {[1e6] * 10}"]))
    model = tmp_path / "mini_humanoid.xml"
    model.write_text(model.read_text().replace('integrator="implicitfast"', 'integrator="Euler"'))
    with pytest.raises(TrainingError, match="needs a smaller timestep or weaker gains"):
        trained(tmp_path / "r", "task=walk", "steps=4096", f"body={body}")


def test_a_damaged_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "told", lambda *_: "")
    plain = PPO.iterate
    monkeypatch.setattr(
        PPO, "iterate", lambda self: plain(self) if self.taken < 256 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "r", "task=squat", "steps=1024")
    file = tmp_path / "r" / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"0000000")
    with pytest.raises(AdapterError, match="its files are not as they were written; overwrite=true begins anew"):
        trained(tmp_path / "r", "task=squat", "steps=1024")
    monkeypatch.undo()
    trained(tmp_path / "r", "task=squat", "steps=1024", "overwrite=true")
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("file", "content"), [("json", b""), ("json", b"[]"), ("json", b"{}"), ("safetensors", b"x" * 40)]
)
@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_lost_where_a_checkpoint_is_damaged(
    file: str, content: bytes, finished: bool, blend: Path, tmp_path: Path
) -> None:
    place = tmp_path / "r"
    shutil.copytree(blend.parent / "walk", place)
    if not finished:
        (place / "results.json").unlink()
    (place / "checkpoint" / f"state.{file}").write_bytes(content)
    kept = {part: part.read_bytes() for part in place.rglob("*") if part.is_file()}
    with pytest.raises(AdapterError, match=r"checkpoint cannot be taken up: .+; overwrite=true begins anew"):
        trained(place, "task=walk", "steps=512")
    assert kept == {part: part.read_bytes() for part in place.rglob("*") if part.is_file()}


@pytest.mark.parametrize("steps", ["abc", None, [], {}, float("inf")])
def test_results_that_were_edited_are_named(steps: Any, blend: Path, tmp_path: Path) -> None:
    shutil.copytree(blend.parent / "walk", tmp_path / "r")
    file = tmp_path / "r" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": steps}))
    with pytest.raises(ConfigError, match=r"results\.json is damaged"):
        trained(tmp_path / "r", "task=walk", "steps=512")


def test_the_last_round_is_told_where_nothing_was_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", "task=walk", "steps=256")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "told", stopped)
    monkeypatch.setattr(training, "SPEAKS", -1)
    monkeypatch.setattr(training.sys.stderr, "isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt, match="stopped after 128 steps"):
        training.train(load_run([*QUICK, "task=walk", "steps=128", f"out={tmp_path / 'r'}"], blends=False))
    monkeypatch.undo()
    found = trained(tmp_path / "r", "task=walk", "steps=128")
    assert found["last"].keys() == whole["last"].keys()


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(training, "write_state", full)
    with pytest.raises(ConfigError, match=r"cannot write .*checkpoint: I/O error: No space left"):
        trained(tmp_path / "r", "task=walk", "steps=128")
    with pytest.raises(ConfigError, match="cannot write /dev/full: No space left"):
        training._log(Path("/dev/full"), {"steps": 1})


def test_rounds_too_small_to_learn_from_are_refused(tmp_path: Path) -> None:
    for few in (("num_envs=1", "ppo.steps=1", "ppo.minibatches=1"), ("num_envs=1", "ppo.steps=3", "ppo.minibatches=4")):
        with pytest.raises(ConfigError, match="samples a round, too few"):
            trained(tmp_path / "r", "task=walk", "steps=128", *few)
    assert not (tmp_path / "r").exists()


def test_a_blend_has_each_skill_once_and_leaves_them_alone(blend: Path) -> None:
    walk = blend.parent / "walk"
    for skills, out, said in (
        (f"{walk},{walk / 'model'}", "new", "names the same twice"), (str(walk), "walk", "which is to be blended"),
        (str(walk / "model"), "walk", "which is to be blended"),
    ):  # fmt: skip
        line = ("task=far_reach", f"skills={skills}", "steps=128", "overwrite=true")
        with pytest.raises(ConfigError, match=said):
            trained(blend.parent / out, *line, blends=True)
    assert (walk / "results.json").is_file()


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    for name in ("walk", "reach"):
        trained(place / name, f"task={name}", "steps=256")
    trained(place / "blend", "task=far_reach", f"skills={place / 'walk'},{place / 'reach'}", "steps=512", blends=True)
    return place / "blend"


def test_a_blend_trains_and_is_measured(blend: Path) -> None:
    found = evaluate(load(blend), "far_reach", "mini_humanoid", rollouts=6, seconds=1.0)
    assert {*found["errors"]} == {"wrist"}
    assert 0 <= found["success"] <= found["survival"] <= 1
    assert found["energy"] == found["velocity"] * found["torque"]
    assert found == evaluate(load(blend), "far_reach", "mini_humanoid", rollouts=6, seconds=1.0)


def test_stable_baselines_acts_as_we_do_and_goes_on_training(blend: Path, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from moesaic.skills.for_sb3 import ActorPolicy, VecSkillEnv

    env = VecSkillEnv(SkillEnv("far_reach", num_envs=4, autoreset="same_step", seconds=0.4))
    model = sb3.PPO(ActorPolicy, env, n_steps=32, batch_size=64, policy_kwargs={"folder": str(blend)}, seed=0)
    observed = env.reset()
    wanted = load(blend)(torch.from_numpy(observed)).detach().numpy()
    np.testing.assert_allclose(model.predict(observed, deterministic=True)[0], wanted, rtol=1e-5, atol=1e-6)
    for _ in range(20):
        observed, _, done, told = env.step(np.zeros((4, 10), np.float32))
    assert done.all()
    assert all(own["TimeLimit.truncated"] and own["terminal_observation"].shape == observed[0].shape for own in told)
    model.learn(256)
    frozen = load(blend).skills.state_dict()
    assert all(torch.equal(held, frozen[name]) for name, held in model.policy.action_net.skills.state_dict().items())
    model.save(tmp_path / "ours.zip")
    model.policy.save_actor(tmp_path / "kept", task="far_reach")
    kept = load(tmp_path / "kept")
    wanted = model.predict(observed, deterministic=True)[0]
    np.testing.assert_allclose(kept(torch.from_numpy(observed)).detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept.std, model.policy.log_std.detach().exp())
    assert opened(str(tmp_path / "kept"), Look())[1] == "far_reach"
    again = sb3.PPO.load(tmp_path / "ours.zip")
    np.testing.assert_array_equal(again.predict(observed)[0].shape, (4, 10))


def test_stable_baselines_sees_bodies_and_asks_of_each(blend: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from moesaic.skills.for_sb3 import ActorPolicy, VecSkillEnv

    env = VecSkillEnv(SkillEnv("far_reach", num_envs=2, autoreset="same_step", render_mode="rgb_array"))
    env.reset()
    assert env.render().shape[-1] == 3
    assert len(env.get_images()) == 2
    assert env.env_method("state", indices=[0, 1])[1].keys() == env.env.state().keys()
    assert env.get_attr("name", indices=np.int64(0)) == ["far_reach"]
    with pytest.raises(ConfigError, match="resets in the same step: SkillEnv"):
        VecSkillEnv(gym.make("moesaic/MiniHumanoid-Walk-v0"))
    body = replace(load_body("mini_humanoid"), kp=[9.0] * 10)
    for other, said in ((body, "is for another body: kp="), ("humanoid", "10 joints, and")):
        env = VecSkillEnv(SkillEnv("far_reach", other, num_envs=2, autoreset="same_step"))
        with pytest.raises(AdapterError, match=said):
            sb3.PPO(ActorPolicy, env, policy_kwargs={"folder": str(blend)})
    env = VecSkillEnv(SkillEnv("walk", num_envs=2, autoreset="same_step"))
    with pytest.raises(ConfigError, match="sees 41 numbers and moves 10 joints, and here are 38 and 10"):
        sb3.PPO(ActorPolicy, env, policy_kwargs={"folder": str(blend)})


def test_rsl_rl_refuses_a_policy_of_another_body(blend: Path) -> None:
    runners = pytest.importorskip("rsl_rl.runners")
    from moesaic.skills.for_rsl_rl import RslEnv, settings

    own = load_body("mini_humanoid")
    body = replace(own, joints=own.joints[::-1], default=own.default[::-1])
    for task, other, said in (("far_reach", body, "is for another body: joints="), ("walk", own, "sees 41 numbers")):
        env = RslEnv(SkillEnv(task, other, num_envs=2, autoreset="same_step"))
        with pytest.raises(MoesaicError, match=said):
            runners.OnPolicyRunner(env, settings(str(blend), env), None)


def test_rsl_rl_acts_as_we_do_and_goes_on_training(blend: Path, tmp_path: Path) -> None:
    runners = pytest.importorskip("rsl_rl.runners")
    from moesaic.skills.for_rsl_rl import RslEnv, settings

    env = RslEnv(SkillEnv("far_reach", num_envs=4, autoreset="same_step", seconds=0.4))
    runner = runners.OnPolicyRunner(env, {**settings(str(blend), env), "num_steps_per_env": 8}, str(tmp_path))
    seen = env.get_observations()
    torch.testing.assert_close(runner.get_inference_policy()(seen), load(blend)(seen["policy"]))
    runner.learn(2)
    runner.save(str(tmp_path / "ours.pt"))
    runner.load(str(tmp_path / "ours.pt"))


def test_onnx_acts_as_we_do(blend: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from moesaic.skills.export import to_onnx

    for name in (blend, blend.parent / "walk"):
        policy = load(name)
        to_onnx(policy, tmp_path / "p.onnx")
        session = runtime.InferenceSession(tmp_path / "p.onnx")
        for rows in (1, 5):
            o = torch.randn(rows, policy.command_dim + policy.shared_dim)
            (found,) = session.run(None, {"observation": o.numpy()})
            np.testing.assert_allclose(found, policy(o).detach().numpy(), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"must end in \.onnx"):
        to_onnx(policy, tmp_path / "p.pt")


def official(dim: int, command: int, hidden: tuple[int, ...] = (12, 8)) -> dict[str, torch.Tensor]:
    sizes = [command + 3 * dim + 6, *hidden, dim]
    made = {"std": torch.rand(dim)}
    for number, (before, after) in enumerate(pairwise(sizes)):
        made |= {
            f"actor.{2 * number}.weight": torch.randn(after, before),
            f"actor.{2 * number}.bias": torch.randn(after),
        }
    return {**made, "critic.0.weight": torch.randn(3, 9)}


def test_a_published_checkpoint_is_taken_by_its_shapes(tmp_path: Path) -> None:
    body, file = load_body("humanoid"), tmp_path / "model_15000.pt"
    state = official(19, 14)
    torch.save({"model_state_dict": state, "iter": 15000, "infos": None}, file)
    skill = import_official(file, "reach", body)
    o = torch.randn(4, 14 + 63)
    wanted = o
    for number in (0, 2, 4):
        wanted = wanted @ state[f"actor.{number}.weight"].t() + state[f"actor.{number}.bias"]
        wanted = torch.nn.functional.elu(wanted) if number < 4 else wanted
    torch.testing.assert_close(skill(o), wanted)
    assert torch.equal(skill.std, state["std"])
    with pytest.raises(AdapterError, match="sees 77 numbers, and walk of a body with 19 joints 66"):
        import_official(file, "walk", body)
    with pytest.raises(AdapterError, match="moves 19 joints, and the body has 10"):
        import_official(file, "reach", load_body("mini_humanoid"))
    torch.save({"model_state_dict": {"actor.weight": torch.ones(2)}}, file)
    with pytest.raises(AdapterError, match="holds no actor of linear layers"):
        import_official(file, "reach", body)
    torch.save({"model_state_dict": {"actor.0.weight": Path("x")}}, file)
    with pytest.raises(AdapterError, match=r"is no checkpoint of tensors alone: it is damaged, or may run code$"):
        import_official(file, "reach", body)


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("std", torch.ones(3), "std must be 19 numbers above 0"),
        ("std", torch.full((19,), torch.nan), "std must be"),
        ("std", -torch.ones(19), "std must be"),
        ("actor.0.bias", torch.full((12,), torch.nan), "actor.0.bias is not dense, real and finite"),
        ("actor.0.weight", torch.ones(12, 77).to_sparse(), "actor.0.weight is not dense"),
        ("actor.0.weight", torch.ones(12, 77, dtype=torch.complex64), "actor.0.weight is not dense"),
        (5, torch.ones(1), "no model_state_dict of tensors by name"),
    ],
)
def test_a_published_checkpoint_of_no_numbers_is_refused(name: Any, held: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"model_state_dict": official(19, 14) | {name: held}}, file)
    with pytest.raises(AdapterError, match=said):
        import_official(file, "reach", load_body("humanoid"))
