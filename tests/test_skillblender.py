"""SkillBlender's forward pass and its gradients, against the paper's formula written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import AdapterError, ConfigError
from moesaic.routing import RoutingTrace
from moesaic.skills.saving import load, load_skill, save
from moesaic.skills.skill import Skill
from moesaic.skills.skillblender import KINDS, SkillBlender

DIM, SHARED, COMMAND = 4, 9, 3
RELIES: dict[str, Any] = {"joints": ["a", "b", "c", "d"], "kp": [1.0] * 4}


def skill(name: str, command_dim: int, low: float = -1.0, seed: int = 0, **relies: Any) -> Skill:
    torch.manual_seed(seed)
    made = Skill(name, {**RELIES, **relies}, command_dim, SHARED, DIM, [8], (low, 1.0))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    made.std.uniform_(0.5, 2)
    return made


def blender(kind: str = "per_joint", seed: int = 3) -> SkillBlender:
    skills = [skill("walk", 1, -0.5, 1), skill("reach", 4, -1.0, 2)]
    torch.manual_seed(seed)
    made = SkillBlender(skills, COMMAND, [16], kind)
    torch.nn.init.normal_(made.head[-1].weight)
    return made


def naive(model: SkillBlender, o: Tensor) -> Tensor:
    """One row and one joint at a time."""
    rows = []
    for row in o:
        y = model.head(row)
        at, commands = 0, []
        for one in model.skills:
            low, high = one.bounds
            commands.append([min(max(v.item(), low), high) for v in y[at : at + one.command_dim]])
            at += one.command_dim
        does = [one(torch.cat([torch.tensor(g), row[COMMAND:]])) for one, g in zip(model.skills, commands, strict=True)]
        z, joints = y[at:], []
        for j in range(DIM):
            own = [z[i * DIM + j] if model.kind == "per_joint" else z[i] for i in range(len(does))]
            if model.kind == "mcp":
                gates = [torch.sigmoid(v) / one.std[j] ** 2 for v, one in zip(own, model.skills, strict=True)]
                weights = [g / sum(gates) for g in gates]
            elif model.kind == "switch":
                weights = [torch.tensor(float(v == max(own))) for v in own]
            else:
                weights = list(torch.softmax(torch.stack(own), 0))
            joints.append(sum(w * does[i][j] for i, w in enumerate(weights)))
        rows.append(torch.stack(joints))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_blend_is_its_formula(kind: str) -> None:
    model, o = blender(kind), torch.randn(6, COMMAND + SHARED)
    torch.testing.assert_close(model(o), naive(model, o), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_learn_through_skills_that_stay_frozen(kind: str) -> None:
    model, o = blender(kind), torch.randn(64, COMMAND + SHARED)
    model.head[-1].weight.data *= 0.05
    model.head[-1].bias.data.zero_()
    model(o).pow(2).sum().backward()
    grad = model.head[-1].weight.grad
    assert (grad[:5].abs().sum(dim=1) > 0).all(), "commands"
    assert (grad[5:].abs().sum(dim=1) > 0).all(), "weights"
    assert all(p.grad is None and not p.requires_grad for p in model.skills.parameters())


def test_a_command_that_is_clamped_has_no_gradient() -> None:
    model = blender()
    with torch.no_grad():
        model.head[-1].bias[:5] = -50.0
    commands, _ = model.asked(torch.randn(3, COMMAND + SHARED))
    assert commands[0].eq(-0.5).all(), "each skill's own bounds"
    assert commands[1].eq(-1.0).all()
    sum(c.sum() for c in commands).backward()
    assert model.head[-1].weight.grad[:5].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_skill_is_itself_and_equal_logits_are_the_mean(kind: str) -> None:
    o = torch.randn(5, COMMAND + SHARED)
    alone = SkillBlender([skill("reach", 4, -1.0, 2)], COMMAND, [16], kind)
    (command,), _ = alone.asked(o)
    torch.testing.assert_close(alone(o), alone.skills[0](torch.cat([command, o[:, COMMAND:]], -1)))
    if kind == "switch":
        return
    model = blender(kind)
    for one in model.skills:
        one.std.fill_(0.7)
    model.precision.fill_(1 / 0.49)
    with torch.no_grad():
        model.head[-1].weight[5:] = 0
        model.head[-1].bias[5:] = 0.3
    commands, _ = model.asked(o)
    torch.testing.assert_close(model(o), model.actions(o, commands).mean(dim=-1))


def test_weights_are_a_skill_and_joint_and_a_trace_counts_them() -> None:
    model, o = blender(), torch.randn(7, COMMAND + SHARED)
    _, routing = model.asked(o)
    assert routing.weights.shape == (7, DIM, 2)
    torch.testing.assert_close(routing.weights.sum(dim=-1), torch.ones(7, DIM))
    trace = RoutingTrace(names=["walk", "reach"])
    trace.update(model.records(o, RELIES["joints"]))
    assert [*trace.utilisation()] == RELIES["joints"]
    own = routing.weights.mean(dim=0)
    for number, share in enumerate(trace.utilisation().values()):
        torch.testing.assert_close(share.float(), own[number])


def test_what_is_saved_is_the_same_and_is_refused_for_another_body(tmp_path: Path) -> None:
    o = torch.randn(5, COMMAND + SHARED)
    for made in (blender(), blender("mcp"), skill("walk", COMMAND)):
        save(made, tmp_path / "p", {"steps": 3})
        again = load(tmp_path / "p", made.relies)
        assert type(again) is type(made)
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), made.state_dict().values(), strict=True)
        )
        torch.testing.assert_close(again(o), made(o))
        with pytest.raises(AdapterError, match=r"is for another body: kp=1.0,1.0,1.0,1.0, now 2.0,1.0,1.0,1.0"):
            load(tmp_path / "p", {**RELIES, "kp": [2.0, 1.0, 1.0, 1.0]})
    save(blender(), tmp_path / "blend", {})
    with pytest.raises(ConfigError, match="holds a blend, and a skill is wanted"):
        load_skill(tmp_path / "blend")
    with pytest.raises(ConfigError, match="holds no policy"):
        load(tmp_path)
    (tmp_path / "p" / "policy.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(AdapterError, match="is damaged"):
        load(tmp_path / "p")


def test_skills_of_different_bodies_do_not_blend() -> None:
    with pytest.raises(ConfigError, match=r"walk and reach do not go together: joints=a,b,c,d, now d,c,b,a"):
        SkillBlender([skill("walk", 1), skill("reach", 4, joints=["d", "c", "b", "a"])], COMMAND, [8])
    with pytest.raises(ConfigError, match="kind=sum; known: per_joint, scalar, switch, mcp"):
        SkillBlender([skill("walk", 1)], COMMAND, [8], "sum")


@pytest.mark.parametrize("hidden", [[0], [-1], [8.0], [True], 0])
def test_sizes_that_are_none_are_refused(hidden: Any) -> None:
    for made in (
        lambda: SkillBlender([skill("walk", 1)], COMMAND, hidden), lambda: Skill("walk", RELIES, 1, 9, DIM, hidden),
        lambda: Skill("walk", RELIES, 0, SHARED, DIM, [8]),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="must be whole numbers above 0"):
            made()


def test_a_blend_has_each_skill_once_and_weighs_by_deviations(tmp_path: Path) -> None:
    one, other = skill("walk", 1), skill("reach", 4)
    with pytest.raises(ConfigError, match="a blend has each skill once"):
        SkillBlender([one, one], COMMAND, [8])
    other.std[0] = 0
    with pytest.raises(ConfigError, match="reach has a deviation that is not above 0"):
        SkillBlender([one, other], COMMAND, [8], "mcp")
    with pytest.raises(ConfigError, match=r"trained holds what JSON cannot: .*set"):
        save(one, tmp_path / "p", {"tags": {1}})
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "change", [{"relies": held} for held in ([], None, {}, 3, {"joints": 3}, {"joints": None}, {"joints": ["a", 1]})]
    + [{"command_dim": True}, {"command_dim": 0}, {"dim": -1}, {"hidden": [0]}, {"shared_dim": 9.0}],
)  # fmt: skip
def test_a_manifest_that_was_edited_is_damaged(
    change: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    save(skill("walk", COMMAND), tmp_path, {})
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=r"is damaged: (what walk relies on|the sizes of walk)"):
        load(tmp_path, RELIES)
    assert not recwarn.list


def test_a_policy_that_was_kept_without_its_control_step_is_taken(tmp_path: Path) -> None:
    old, new = skill("walk", 1), skill("reach", 4, dt=0.02)
    save(old, tmp_path / "old", {})
    assert load(tmp_path / "old", {**RELIES, "dt": 0.02}).relies == RELIES
    SkillBlender([old, new], COMMAND, [8])
    save(new, tmp_path / "new", {})
    with pytest.raises(AdapterError, match=r"is for another body: dt=0\.02, now 0\.01"):
        load(tmp_path / "new", {**RELIES, "dt": 0.01})
