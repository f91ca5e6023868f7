"""Read-ME: the facts that its specification asks for, on models of a few thousand parameters."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic import ffn
from moesaic.errors import ConfigError
from moesaic.ffn.layer import ExpertLayer
from moesaic.ffn.masks import Masks, masks, scores, shared
from moesaic.ffn.pregate import PreGate
from moesaic.ffn.read_me import ReadMe
from moesaic.ffn.split import read, seats
from moesaic.ffn.tune import Rounds, distillation, firing, masked, overlaps, released, targets, tune
from tests.test_ffn import IDS, MODELS, WIDE, D, logits, made

DOMAINS = ["a", "b", "c"]
STARTS = (3, 18, 33)


def domain(start: int, rows: int = 8) -> dict[str, Tensor]:
    """Rows whose tokens come in equal pairs, of words of their own."""
    ids = torch.randint(start, start + 5, (rows, 17))
    ids[:, 1::2] = ids[:, 0::2][:, :8]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mixed() -> Iterator[dict[str, Tensor]]:
    while True:
        parts = [domain(start, 4) for start in STARTS]
        yield {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def masks_of(model: PreTrainedModel, width: int = 32) -> Masks:
    torch.manual_seed(0)
    return masks(scores(model, {n: [domain(s)] for n, s in zip(DOMAINS, STARTS, strict=True)}), width)


def pre_gate(*, seed: int = 1) -> PreGate:
    torch.manual_seed(seed)
    return PreGate(50, 3, dim=16, heads=2)


def converted(model: PreTrainedModel, found: Masks, **settings: Any) -> PreTrainedModel:
    width = int(next(iter(found.values()))[0].sum())
    method = ReadMe(DOMAINS, width, router_dim=16, router_heads=2, **settings)
    return ffn.convert(copy.deepcopy(model), method, masks=found, pre_gate=pre_gate()).eval()


# -- statistics and masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_mean_magnitudes_over_real_tokens_however_they_are_batched(kind: str) -> None:
    model, found = made(kind), []
    rows = {name: domain(start, 6) for name, start in zip(DOMAINS, STARTS, strict=True)}
    for row in rows.values():
        row["attention_mask"][:3, 9:] = 0
    kept = {name: [] for name in DOMAINS}
    for seat in seats(model):
        module = model.get_submodule(f"{seat.name}.{seat.last}")
        module.register_forward_pre_hook(lambda m, args, name=seat.name: found.append((name, args[0].detach())))
    for name, row in rows.items():
        found.clear()
        with torch.no_grad():
            model(**row)
        kept[name] = [h.view(6, 17, -1)[row["attention_mask"].bool()].abs().mean(0) for _, h in found]
    held: list[Any] = []
    most = 0

    def drawn(row: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        nonlocal most
        for i in range(0, 6, 2):
            batch = {key: values[i : i + 2].clone() for key, values in row.items()}
            held.append(weakref.ref(batch["input_ids"]))
            most = max(most, sum(ids() is not None for ids in held))
            yield batch
            del batch

    for batches in ({n: [row] for n, row in rows.items()}, {n: drawn(row) for n, row in rows.items()}):
        for i, (_, score) in enumerate(scores(model, batches).items()):
            assert score.shape == (3, WIDE)
            wanted = torch.stack([kept[name][i] for name in DOMAINS])
            torch.testing.assert_close(score.float(), wanted, rtol=1e-4, atol=1e-5)
    assert len(held) == 9
    assert most <= 2, "a batch is let go of before the one after the next is drawn"


def test_6_planted_neurons_are_the_mask() -> None:
    model = made("opt")  # a bias before the ReLU plants what fires
    for seat in seats(model):
        up = model.get_submodule(f"{seat.name}.{seat.first[0]}")
        with torch.no_grad():
            up.weight.mul_(1e-3)
            up.bias.fill_(-1.0)
            up.bias[torch.arange(0, WIDE, 4)] = 2.0
    for mask in masks_of(model, WIDE // 4).values():
        assert torch.equal(mask, (torch.arange(WIDE) % 4 == 0).expand(3, -1))


def test_5_the_permanent_part_and_what_is_an_experts_own() -> None:
    """Read off the converted layers: which of the dense model's neurons their rows are."""
    model = made("llama")
    found = masks_of(model)
    layers = ffn.expert_layers(converted(model, found, residual="separate")).values()
    overlap = 0
    for seat, layer in zip(seats(model), layers, strict=True):
        up = read(model, seat).up

        def neurons(rows: Tensor, up: Tensor = up) -> set[int]:
            which = (rows[:, None] == up).all(-1).nonzero()
            assert which[:, 0].tolist() == list(range(len(rows))), "each row is one neuron's"
            return {*which[:, 1].tolist()}

        common = neurons(layer.shared.slices().up[0])
        own = [neurons(rows) for rows in layer.experts.slices().up]
        assert common == {*shared(found[seat.name]).nonzero().flatten().tolist()} != set()
        for expert, mask in zip(own, found[seat.name], strict=True):
            assert not expert & common
            assert len(expert) + len(common) == 32, "exactly d neurons, not d-1"
            assert expert | common == {*mask.nonzero().flatten().tolist()}
        overlap += len(own[0] & own[1])
    assert overlap > 0


# -- the router ----------------------------------------------------------------------------------------------------


def test_2_a_token_changes_no_route_before_it() -> None:
    router, ids = pre_gate(), IDS.clone()
    before = router(ids)[0]
    ids[:, 4] = 49
    after = router(ids)[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("left", [False, True])
def test_keys_and_values_are_those_of_a_whole_pass_and_padding_is_not_seen(left: bool) -> None:
    router = pre_gate()
    whole = router(IDS)[0]
    past, parts = None, []
    for t in range(IDS.shape[1]):
        step, past = router(IDS[:, t : t + 1], None, past)
        parts.append(step)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)
    filler = torch.full((2, 3), 7)
    ids = torch.cat([filler, IDS] if left else [IDS, filler], dim=1)
    real = torch.cat([torch.zeros(2, 3), torch.ones(2, 7)] if left else [torch.ones(2, 7), torch.zeros(2, 3)], dim=1)
    found = router(ids, real)[0]
    torch.testing.assert_close(found[:, 3:] if left else found[:, :7], whole, rtol=1e-4, atol=1e-5)


def test_the_router_begins_with_the_models_embedding_beside_masks_of_its_scores() -> None:
    model, rows = made("llama"), {n: domain(s)["input_ids"] for n, s in zip(DOMAINS, STARTS, strict=True)}
    table = model.get_input_embeddings().weight
    for dim in (16, 48):
        parts = ReadMe(DOMAINS, 32, router_dim=dim, router_heads=2).parts(model, rows, batch_size=3)
        begun = parts["pre_gate"].embedding.weight
        assert begun.shape == (50, dim)
        assert torch.equal(begun[:, :D], table[:, :dim])
    wanted = masks(scores(model, {n: [{"input_ids": ids}] for n, ids in rows.items()}), 32)
    assert all(torch.equal(parts["masks"][name], mask) for name, mask in wanted.items())


def test_the_routers_size_is_that_of_the_papers_table() -> None:
    count = sum(p.numel() for p in PreGate(32_000, 7).parameters())
    assert count / 1e6 == pytest.approx(18.0, abs=0.05)


def test_1_routes_are_there_before_any_layer_runs_and_the_same_in_all() -> None:
    model = converted(made("llama"), masks_of(made("llama")))
    ran: list[str] = []
    model.pre_gate.register_forward_hook(lambda *a: ran.append("router"))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear, ExpertLayer)) and "pre_gate" not in name:
            module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    routes = []
    for layer in ffn.expert_layers(model).values():
        layer.experts.register_forward_pre_hook(lambda m, args: routes.append(args[1]))
    logits(model)
    assert ran[0] == "router"
    assert ran.count("router") == 1
    assert len(routes) == 2
    assert torch.equal(routes[0], routes[1])
    assert torch.equal(routes[0].view(2, 7), model.pre_gate(IDS)[0].argmax(-1))


# -- masked and converted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["fused", "separate"])
@pytest.mark.parametrize("kind", MODELS)
def test_4_the_converted_model_is_the_masked_one(kind: str, residual: str) -> None:
    model = made(kind)
    found = masks_of(model)
    chosen = pre_gate()(IDS)[0].argmax(-1)
    assert len(chosen.unique()) > 1
    with masked(model, found, lambda: chosen):
        wanted = logits(model)
    assert not torch.allclose(wanted, logits(model), atol=1e-4) or kind in ("opt", "bert")
    torch.testing.assert_close(logits(converted(model, found, residual=residual)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", ["fused", "separate"])
def test_3_experts_of_all_neurons_are_the_dense_model(residual: str) -> None:
    model = made("llama")
    whole = {name: torch.ones_like(mask) for name, mask in masks_of(model).items()}
    torch.testing.assert_close(logits(converted(model, whole, residual=residual)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", ["fused", "separate"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_gives_the_model_back_and_decodes_with_its_cache(kind: str, residual: str, tmp_path: Path) -> None:
    model = converted(made(kind), masks_of(made(kind)), residual=residual)
    model.save_pretrained(tmp_path)
    again = ffn.load(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    real = torch.ones_like(IDS)
    real[0, :2] = 0
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": real}
    cached = again.generate(IDS, **how)
    assert torch.equal(cached, again.generate(IDS, **how, use_cache=False))
    assert torch.equal(
        again.generate(IDS, **how, num_beams=3), again.generate(IDS, **how, num_beams=3, use_cache=False)
    )
    alone = again.generate(IDS[:1, 2:], **how | {"attention_mask": real[:1, 2:]})
    assert torch.equal(cached[:1, 2:], alone), "11: a batch is answered as its rows are"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral"])
def test_padding_is_not_seen_with_a_static_cache_either(kind: str) -> None:
    base = made(kind)
    if kind == "mistral":
        base.config.sliding_window = 6
    model = converted(base, masks_of(base))
    routed: list[Tensor] = []
    model.pre_gate.register_forward_hook(lambda module, args, out: routed.append(out[0][0, -1]))
    ids = torch.tensor([[40, 7, 21]])
    padded = torch.cat([torch.zeros(1, 12, dtype=torch.long), ids], dim=1)
    found = []
    for asked, cache in ((ids, None), (padded, None), (padded, "static")):
        routed.clear()
        mask = (asked != 0).long()
        how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        written = model.generate(asked, attention_mask=mask, cache_implementation=cache, **how)[0, -8:]
        found.append((written, torch.stack(routed)))
    for written, logits_of in found[1:]:
        assert torch.equal(written, found[0][0])
        torch.testing.assert_close(logits_of, found[0][1], rtol=1e-4, atol=1e-5)


def test_what_is_cropped_off_the_cache_is_gone_for_the_router_too() -> None:
    model, read_at = converted(made("llama"), masks_of(made("llama"))), []
    model.pre_gate.register_forward_hook(lambda m, args, out: read_at.append((model.host.frame.memory.past, out[0])))
    other = torch.cat([IDS[:, :3], IDS[:, 3:].flip(1)], dim=1)
    with torch.no_grad():
        cache = model(input_ids=IDS).past_key_values
        cache.crop(-4)
        found = model(input_ids=other[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(input_ids=other).logits[:, 3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read_at[1][1], read_at[2][1][:, 3:], rtol=1e-4, atol=1e-5)
    ids = IDS[:1].repeat(1, 2)  # what comes twice is guessed to go on as before
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    read_at.clear()
    answer = model.generate(ids, **how, prompt_lookup_num_tokens=3)
    guessed = list(read_at)
    assert max(routes.shape[1] for _, routes in guessed[1:]) > 1
    assert torch.equal(model.generate(ids, **how), answer)
    model(input_ids=answer)
    for start, routes in guessed:  # what follows the first may be a guess that was wrong
        torch.testing.assert_close(routes[:, 0], read_at[-1][1][:, start], rtol=1e-4, atol=1e-5)


# -- training ------------------------------------------------------------------------------------------------------


def test_8_distillation_is_a_divergence() -> None:
    counts = [torch.randint(0, 9, (2, 5, 3)).float() for _ in range(4)]
    assert distillation(torch.randn(2, 5, 3), counts) > 0
    assert distillation(counts[0] + 7, [counts[0]]) == pytest.approx(0, abs=1e-6)
    g, o = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in ([1.0, 0.0, -2.0], [0.0, 3.0, 1.0]))
    wanted, backwards = (sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in ((g, o), (o, g)))
    found = distillation(torch.tensor([[[1.0, 0.0, -2.0]]]), [torch.tensor([[[0.0, 3.0, 1.0]]])] * 2)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert found.item() != pytest.approx(backwards, rel=0.1)
    real = torch.ones(2, 5)
    real[1, 2:] = 0
    own = torch.randn(2, 5, 3)
    other = own.clone()
    other[1, 2:] = 9
    assert torch.equal(distillation(own, counts, real), distillation(other, counts, real))


def test_overlaps_count_the_larger_half() -> None:
    hidden = torch.tensor([[[3.0, -5.0, 0.1, 1.0], [0.0, 0.2, -4.0, 2.0]]])
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert overlaps(hidden, mask).tolist() == [[[2.0, 0.0], [0.0, 2.0]]]


def test_firing_counts_an_experts_own_neurons_above_five_thresholds() -> None:
    """n = 10 of each expert's own, which overlap, and 4 of all: `1[feat > q-th largest] / 3n`, signed."""
    hidden, mask = torch.randn(2, 5, 34), torch.zeros(3, 34, dtype=torch.bool)
    own = [range(4 + 8 * i, 14 + 8 * i) for i in range(3)]
    for row, neurons in zip(mask, own, strict=True):
        row[[*range(4), *neurons]] = True
    wanted = []
    for token in hidden.flatten(0, 1).tolist():
        largest = sorted(token, reverse=True)
        dist = [sum(token[c] > largest[q - 1] for q in (9, 8, 6, 4, 2) for c in neurons) / 30 for neurons in own]
        wanted.append([10 * (count - sum(dist) / 3) for count in dist])
    torch.testing.assert_close(firing(hidden, mask), torch.tensor(wanted).view(2, 5, 3))


def test_rates_fall_by_a_cosine_in_each_stage_and_by_the_decay_from_round_to_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[float, float]] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    model = made("llama")
    rounds = Rounds(rounds=2, router_steps=4, expert_steps=2, router_lr=8e-4, expert_lr=2e-4, decay=0.5)
    wanted = [
        0.5**number * lr * (1 + math.cos(math.pi * step / steps)) / 2
        for number in (0, 1)
        for lr, steps in ((8e-4, 4), (2e-4, 2))
        for step in range(steps)
    ]
    for first in (0, 1):  # from the beginning, and after a break
        seen.clear()
        assert list(tune(model, pre_gate(), masks_of(model), mixed(), rounds, first=first)) == [0, 1][first:]
        assert [lr for lr, _ in seen] == pytest.approx(wanted[6 * first :])
    assert {decay for _, decay in seen} == {0.01}


@pytest.mark.parametrize("loss", ["paper", "released"])
def test_7_each_stage_changes_its_own_part_alone(loss: Any) -> None:
    model, router = made("llama"), pre_gate()
    found = masks_of(model)

    def changed(**steps: int) -> tuple[bool, bool]:
        own, other = copy.deepcopy(model), copy.deepcopy(router)
        list(tune(own, other, found, mixed(), Rounds(rounds=1, loss=loss, **steps)))
        assert all(p.requires_grad for p in [*own.parameters(), *other.parameters()])
        return (
            any(not torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True)),
            any(not torch.equal(a, b) for a, b in zip(other.parameters(), router.parameters(), strict=True)),
        )

    assert changed(router_steps=2, expert_steps=0) == (False, True)
    assert changed(router_steps=0, expert_steps=2) == (True, False)


def test_weights_in_half_precision_are_not_trained() -> None:
    model = made("llama").to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"torch.bfloat16 lose most steps of training: load the model with dtype="):
        next(tune(model, pre_gate(), masks_of(model), mixed(), Rounds(1, 1, 1)))


def test_rounds_lower_both_losses_and_find_the_domains() -> None:
    torch.manual_seed(0)
    model, router, batches, said = made("llama"), pre_gate(), mixed(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = next(batches)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found, held = masks_of(model), next(batches)

    def lost() -> list[float]:
        counts = targets(model, found, held, overlaps)
        with torch.no_grad(), masked(model, found, lambda: router(held["input_ids"])[0].argmax(-1)):
            answer = model(**held, labels=held["input_ids"]).loss
        return [distillation(router(held["input_ids"])[0], counts).item(), answer.item()]

    before = lost()
    rounds = Rounds(rounds=2, router_steps=30, expert_steps=20, router_lr=5e-3, expert_lr=3e-3)
    assert list(tune(model, router, found, batches, rounds, say=lambda *told: said.append(told))) == [0, 1]
    assert [stage for stage, _, _ in said] == 2 * (["router"] * 30 + ["experts"] * 20)
    assert all(after < first for after, first in zip(lost(), before, strict=True))
    for i, start in enumerate(STARTS):
        assert (router(domain(start)["input_ids"])[0].argmax(-1) == i).float().mean() > 0.8


def test_the_released_loss_is_that_of_the_code() -> None:
    own, counts = torch.randn(2, 5, 3), [torch.randn(2, 5, 3) for _ in range(2)]
    wanted = 0.0
    for count in counts:
        hard = nn.functional.cross_entropy(own.flatten(0, 1), count.argmax(-1).flatten(), label_smoothing=0.5)
        soft = nn.functional.cross_entropy(own.flatten(0, 1), count.softmax(-1).flatten(0, 1))
        wanted += float(0.75 * hard + 0.25 * soft) / 2
    assert released(own, counts).item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: scores(made("llama"), {"a": [domain(3)]}), "needs two domains at least"),
        (lambda: scores(made("llama"), {"a": [domain(3)], "b": []}), "the domain 'b' has no token"),
        (lambda: masks({"x": torch.rand(2, 8)}, 9), "an expert of 9 neurons cannot be cut out of 8"),
        (lambda: ReadMe(["a", "a"], 8), "needs two domains at least, of different names: a, a"),
        (lambda: ReadMe(["a", "b"], 8, "none"), "residual='none' must be one of fused, separate"),  # type: ignore[arg-type]
        (lambda: PreGate(9, 2, dim=20, heads=4), "router_dim=20 must be a multiple of twice router_heads=4"),
        (lambda: Rounds(loss="mine"), "loss='mine' must be one of paper, released"),  # type: ignore[arg-type]
        (lambda: logits_without_ids(), "call the whole model with input_ids"),
    ],
)
def test_bad_input_is_one_clear_line(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked()


def logits_without_ids() -> Tensor:
    model = converted(made("llama"), masks_of(made("llama")))
    return model(inputs_embeds=torch.randn(1, 3, D)).logits


def test_experts_share_the_expert_layers_backends() -> None:
    model = converted(made("llama"), masks_of(made("llama")))
    wanted = logits(model)
    for backend in ("eager", "batched_mm"):
        model.set_experts_implementation(backend)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
