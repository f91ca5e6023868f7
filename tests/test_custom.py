"""Recombined parts: what a part does alone it does in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.lora import METHODS
from moesaic.lora.methods.custom import CustomConfig, SumRouter
from tests import tiny

PARTS = sorted(
    name for name, cls in METHODS.items() if not cls.kind.shares_down and name in tiny.FROM_SCRATCH and name != "custom"
)


def custom(**settings: Any) -> CustomConfig:
    return CustomConfig(r=4, num_experts=4, lora_alpha=8, **settings)


def outputs(config: Any, *, train: bool = False) -> dict[str, torch.Tensor]:
    model = tiny.wrap(tiny.llama(), config).train(train)
    inputs = tiny.batch(model)
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss, "logits": output.logits, **grads}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("method", PARTS)
def test_all_parts_of_one_method_are_that_method(method: str, train: bool) -> None:
    whole = tiny.small(method)
    settings = {name: value for name, value in vars(tiny.small(method)).items() if name.endswith(("_dim", "topics"))}
    level = METHODS[method].level
    parts = custom(router_of=method, settings={method: settings}, top_k=getattr(whole, "top_k", None), level=level)
    parts.lora_dropout = 0.0
    parts.lora_alpha *= whole.scaling / parts.scaling
    wanted, got = outputs(whole, train=train), outputs(parts, train=train)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7)


def test_another_gate_changes_the_weights_and_not_the_logits() -> None:
    import moesaic

    found = {}
    for gate in ("hotmoe", "dynmole"):
        config = custom(router_of="hotmoe", gate_of=gate, losses_of=[], settings={"hotmoe": {"expert_dim": 8}})
        model = tiny.wrap(tiny.llama(layers=1), config)
        layer = next(iter(tiny.mixtures(model).values()))
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        logits = layer.router("default")(x)
        found[gate] = logits, layer.eval_gates["default"](logits).weights
        with moesaic.trace(model) as trace:
            model(**tiny.batch(model))
        assert trace.modules
    assert torch.equal(found["hotmoe"][0], found["dynmole"][0])
    assert ((found["hotmoe"][1] > 0).sum(-1) == 2).all()
    assert not torch.equal(found["hotmoe"][1], found["dynmole"][1])


@pytest.mark.parametrize("fused", [False, True])
def test_logits_of_several_routers_add_up(fused: bool) -> None:
    model = tiny.wrap(tiny.llama(), custom(router_of=["mola", "rmoe"])).double()
    layer = next(iter(tiny.mixtures(model).values()))
    router, x = layer.router("default"), torch.randn(5, 16, dtype=torch.float64)
    assert isinstance(router, SumRouter)
    wanted = sum(part(x) for part in router.routers)
    if fused:
        weight, bias = router.projection()
        got = router.from_projection(x @ weight.T + bias)
    else:
        got = router(x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_shared_cell_stays_shared_under_other_logits() -> None:
    model = tiny.wrap(tiny.llama(), custom(router_of=["mola", "rmoe"]))
    cells = {id(layer.router("default").routers[1].cell) for layer in tiny.mixtures(model).values()}
    assert len(cells) == 1


def test_losses_come_from_their_own_methods_with_their_own_weights() -> None:
    config = custom(router_of="mola", gate_of="dynmole", losses_of=["mola", "dynmole"], aux_weight=0.5)
    wanted = [*METHODS["mola"]().losses(), *METHODS["dynmole"]().losses()]
    assert [type(loss) for loss in config.losses()] == [type(loss) for loss in wanted]
    assert [loss.weight for loss in config.losses()] == [loss.weight / 2 for loss in wanted]


def test_needs_are_those_of_the_parts() -> None:
    assert custom(router_of="moelora", gate_of="moelora").kind.needs_tasks
    assert not custom(router_of="mola").kind.needs_tasks
    assert custom(router_of="topiclora").kind.needs_targets
    assert not custom(router_of="topiclora", losses_of=["mola"]).kind.needs_targets


def test_a_saved_recombination_is_read_back(tmp_path: Path) -> None:
    config = custom(router_of=["hotmoe", "rmoe"], gate_of="dynmole", settings={"hotmoe": {"expert_dim": 8}})
    config.save_pretrained(tmp_path)
    read = CustomConfig.from_pretrained(tmp_path)
    assert read == config
    assert read.part("hotmoe").expert_dim == 8


def test_a_taught_loss_is_taught_and_its_prototypes_are_kept() -> None:
    own = {"topiclora": {"encoder": "hashing", "topic_dim": 8}}
    config = custom(router_of="topiclora", gate_of="mola", losses_of="topiclora", settings=own)
    model = tiny.wrap(tiny.llama(), config)
    targets = config.targets(["add 3 and 4", "translate the word"])
    assert targets is not None
    assert targets.shape == (2, 4)
    kept = model.peft_config["default"].settings["topiclora"]["prototypes"]
    assert kept == config.part("topiclora").prototypes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_of": "hotmo"}, "no router, gate or loss of 'hotmo' to recombine; did you mean 'hotmoe'"),
        ({"router_of": []}, "router_of is empty"),
        ({"router_of": "uniform", "top_k": 2}, "top_k=2 has no effect: none of uniform has one"),
        ({"level": "layer"}, "level='layer' must be one of linear, block"),
        ({"gate_of": "custom"}, "no router, gate or loss of 'custom'"),
        ({"router_of": "mola", "settings": {"hotmoe": {}}}, "settings.hotmoe: no part is of method 'hotmoe'"),
        ({"router_of": "mola", "settings": {"mola": {"topk": 2}}}, "unknown setting 'topk' for MoLAConfig"),
        ({"router_of": "mola", "top_k": 5}, "top_k=5 must be between 1 and num_experts=4"),
        ({"router_of": "mola", "losses_of": ["lora-mixer"]}, "losses_of=lora-mixer and router_of=mola disagree"),
        ({"settings": {"mola": {"r": 64}}}, "settings.mola.r has no effect"),
        ({"settings": {"mola": {"num_experts": 2}}}, "settings.mola.num_experts has no effect"),
        ({"router_of": ["mola", "mola"]}, "router_of=mola,mola names one twice"),
        ({"router_of": 5}, "must be names of methods"),
        ({"gate_of": ["mola"]}, "must be the name of one method"),
        ({"settings": {"mola": 3}}, "must hold settings by method"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom(**settings)
