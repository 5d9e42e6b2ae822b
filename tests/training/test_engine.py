"""The training engine: clipping by group, skipped steps, and a checkpoint that continues bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.zero import settings
from rlhf.recipe import load_recipe
from rlhf.system.rng import load_rng, save_rng
from rlhf.training.clipped_adamw import grad_norm
from rlhf.training.engine import LocalEngine, ParamGroup

BOTH = ("first", "second")


class Two(nn.Module):
    """Two independent parts of two tensors each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x).sum() + self.b(y).square().sum()


def make(model: nn.Module | None = None, **options: object) -> LocalEngine:
    model = model or Two()
    groups = [
        ParamGroup("first", model.a, lr=0.1, max_grad_norm=1.0),
        ParamGroup("second", model.b, lr=0.01, max_grad_norm=1.0),
    ]
    return LocalEngine(model, groups, torch.device("cpu"), **options)


def set_grads(engine: LocalEngine, **grads: list) -> None:
    """Set gradients by parameter name with _ for the dot; the others get zeros."""
    for name, parameter in engine.trainable().items():
        parameter.grad = torch.zeros_like(parameter)
        if (key := name.replace(".", "_")) in grads:
            parameter.grad = torch.tensor(grads[key], dtype=parameter.dtype).reshape(parameter.shape)


def first_moment(engine: LocalEngine, parameter: nn.Parameter) -> list[float]:
    return engine.adamw.state[parameter]["exp_avg"].flatten().tolist()


def weights(engine: LocalEngine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.trainable().items()}


def test_small_updates_of_bfloat16_weights_are_not_lost(tmp_path: Path) -> None:
    """At 0.5 the spacing of bfloat16 is 1/256 downwards: twenty Adam steps of 1e-3 each would all round away."""
    model = Two().to(torch.bfloat16)
    model.a.weight.data.fill_(0.5)
    engine = make(model)
    for i in range(20):
        set_grads(engine, a_weight=[1.0, -1.0])
        for name, parameter in engine.trainable().items():
            assert parameter.dtype == torch.bfloat16, name
        engine.step(BOTH, 0.01)
        if i == 9:
            engine.save(tmp_path)
            middle = {name: w.clone() for name, w in engine.weights().items()}
    # Adam's step has the size of the learning rate under a constant gradient: 0.1 x 0.01, twenty times.
    assert engine.weights()["a.weight"].flatten().tolist() == pytest.approx([0.48, 0.52], abs=1e-4)
    assert model.a.weight.flatten().tolist() == pytest.approx([0.48, 0.52], abs=1 / 256)
    assert middle["a.weight"].flatten().tolist() == pytest.approx([0.49, 0.51], abs=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())

    resumed = make(Two().to(torch.bfloat16))
    resumed.load(tmp_path)
    torch.testing.assert_close(resumed.weights(), middle, rtol=0, atol=0)
    for _ in range(10):
        set_grads(resumed, a_weight=[1.0, -1.0])
        resumed.step(BOTH, 0.01)
    torch.testing.assert_close(resumed.weights(), engine.weights(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.trainable(), engine.trainable(), rtol=0, atol=0)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_each_group_is_clipped_by_its_own_norm() -> None:
    engine = make(betas=(0.9, 0.95))
    # first: (3, 0), bias 4: norm 5, scaled by 1/5. second: 0.3 and 0.4: norm 0.5, below its bound, left as it is.
    set_grads(engine, a_weight=[3.0, 0.0], a_bias=[4.0], b_weight=[0.3, 0, 0, 0, 0, 0], b_bias=[0.0, 0.4])
    result = engine.step(BOTH)
    assert result.grad_norms == pytest.approx({"first": 5.0, "second": 0.5})
    assert result.non_finite == ""
    module = engine.module
    # After one step Adam's first moment is 0.1 of the clipped gradient.
    assert first_moment(engine, module.a.weight) == pytest.approx([0.06, 0.0], abs=1e-6)
    assert first_moment(engine, module.a.bias) == pytest.approx([0.08], abs=1e-6)
    assert first_moment(engine, module.b.weight) == pytest.approx([0.03, 0, 0, 0, 0, 0], abs=1e-6)
    assert first_moment(engine, module.b.bias) == pytest.approx([0.0, 0.04], abs=1e-6)


def test_learning_rates_by_group_times_the_factor() -> None:
    # Adam's first step is lr x sign(gradient), whatever the gradient's size.
    engine = make()
    before = weights(engine)
    set_grads(engine, a_weight=[3.0, -2.0], a_bias=[1.0], b_weight=[1.0] * 6, b_bias=[1.0, -1.0])
    engine.step(BOTH, lr_factor=0.5)
    moved = {name: (p.detach() - before[name]).flatten().tolist() for name, p in engine.trainable().items()}
    assert moved["a.weight"] == pytest.approx([-0.05, 0.05], abs=1e-5)
    assert moved["b.bias"] == pytest.approx([-0.005, 0.005], abs=1e-5)


def test_weight_decay_is_decoupled() -> None:
    engine = make(weight_decay=0.5)
    before = weights(engine)
    set_grads(engine)
    engine.step(BOTH)
    # No gradient: w (1 - lr x decay)
    assert torch.allclose(engine.module.a.weight, before["a.weight"] * 0.95)
    assert torch.allclose(engine.module.b.weight, before["b.weight"] * 0.995)


def test_gradients_add_up_over_micro_batches_and_are_gone_after_the_step() -> None:
    engine = make()
    x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.randn(2, 3)
    for i in range(2):
        engine.backward(engine.model(x[i : i + 1], y[i : i + 1]))
    weight, bias = engine.grads("first")
    assert weight.flatten().tolist() == [4.0, 1.0] and bias.tolist() == [2.0]  # the sum of the rows, two rows
    assert float(grad_norm([weight, bias])) == pytest.approx(math.sqrt(16 + 1 + 4))
    assert len(engine.grads("second")) == 2 and engine.grads("none") == [] and float(grad_norm([])) == 0.0
    engine.step(BOTH)
    assert engine.grads("first") == []


def test_the_norm_of_what_is_added_to_a_gradient() -> None:
    engine = make()
    set_grads(engine, a_weight=[3.0, 4.0])
    with engine.added_norm("first") as parts:
        for _ in range(2):
            engine.backward(engine.module.a(torch.tensor([[2.5, 6.0]])).sum())
    assert engine.grads("first")[0].flatten().tolist() == [8.0, 16.0], "the sum is what is stepped"
    # Added are 5, 12 and, to the bias, 2.
    assert parts == {"before": 5.0, "added": pytest.approx(math.sqrt(5**2 + 12**2 + 2**2))}


def test_the_norm_is_exact_for_large_tensors_however_they_are_cut() -> None:
    grad = torch.randn(3_000_000, generator=torch.Generator().manual_seed(1))
    expected = math.sqrt(sum((part.double() ** 2).sum().item() for part in grad.split(100_000)))
    assert float(grad_norm([grad])) == pytest.approx(expected, rel=1e-6)
    assert float(grad_norm([grad[:17].reshape(1, 17), grad[17:]])) == pytest.approx(expected, rel=1e-6)
    # A bfloat16 gradient's norm is not rounded to the three digits of its type.
    assert float(grad_norm([torch.full((3,), 2.0, dtype=torch.bfloat16)])) == pytest.approx(math.sqrt(12), rel=1e-6)


def test_frozen_parameters_are_left_out() -> None:
    model = Two()
    model.a.bias.requires_grad_(False)
    engine = make(model)
    assert list(engine.trainable()) == ["a.weight", "b.weight", "b.bias"]
    assert [len(group["params"]) for group in engine.adamw.param_groups] == [1, 2]


# --- non-finite gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_skips_the_step_for_all_groups_and_is_named(bad: float) -> None:
    engine = make(max_skipped_steps=5)
    set_grads(engine, a_weight=[1.0, 1.0])
    engine.step(BOTH)
    before = weights(engine)
    # The second tensor of the second group is bad; the first one is fine and must not be blamed.
    set_grads(engine, a_weight=[1.0, 1.0], b_weight=[1.0] * 6, b_bias=[0.5, bad])
    result = engine.step(BOTH)
    assert result.non_finite == "second.bias.grad"
    assert result.grad_norms["first"] == pytest.approx(math.sqrt(2))
    assert not math.isfinite(result.grad_norms["second"])
    after = weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = {int(state["step"]) for state in engine.adamw.state.values()}
    assert steps == {1}, "the optimiser's counters do not move"
    assert (engine.skipped_steps, engine.skipped_in_a_row) == (1, 1)
    assert engine.grads("first") == [], "the bad gradient is gone"
    set_grads(engine, a_weight=[1.0, 1.0])
    assert engine.step(BOTH).non_finite == ""
    assert (engine.skipped_steps, engine.skipped_in_a_row) == (1, 0)
    assert not torch.equal(weights(engine)["a.weight"], before["a.weight"])


def test_an_overflowing_norm_of_finite_gradients_is_skipped_too() -> None:
    engine = make()
    set_grads(engine, a_weight=[3e38, 3e38], a_bias=[3e38])
    result = engine.step(BOTH)
    assert result.non_finite == "first.gradient norm overflow"
    assert engine.skipped_steps == 1


def test_the_run_stops_after_n_bad_steps_in_a_row() -> None:
    engine = make(max_skipped_steps=3)
    for kind in "bbgbb":  # two bad, one good, two bad: never three in a row
        set_grads(engine, a_bias=[math.nan if kind == "b" else 1.0])
        engine.step(BOTH)
    assert (engine.skipped_steps, engine.skipped_in_a_row) == (4, 2)
    set_grads(engine, a_bias=[math.nan])
    with pytest.raises(UserError, match=r"3 optimiser steps in a row .* first\.bias\.grad"):
        engine.step(BOTH)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def train(engine: LocalEngine, steps: int) -> list[float]:
    """Steps whose data come from torch's global generator, so that its state is part of the checkpoint."""
    losses = []
    for _ in range(steps):
        loss = engine.model(torch.randn(4, 2), torch.randn(4, 3)) ** 2 / 10
        engine.backward(loss)
        engine.step(BOTH)
        losses.append(loss.item())
    return losses


def test_a_loaded_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    engine = make(weight_decay=0.1, max_skipped_steps=9)
    train(engine, 2)
    set_grads(engine, a_bias=[math.nan])
    engine.step(BOTH)
    engine.save(tmp_path / "state")
    save_rng(tmp_path)
    expected = train(engine, 3)
    other = Two()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    again = make(other, weight_decay=0.1, max_skipped_steps=9)
    torch.manual_seed(99)
    again.load(tmp_path / "state")
    load_rng(tmp_path)
    assert (again.skipped_steps, again.skipped_in_a_row) == (1, 1)
    assert train(again, 3) == expected
    for (name, one), two in zip(engine.trainable().items(), again.trainable().values(), strict=True):
        assert torch.equal(one, two), name
        for key, value in engine.adamw.state[one].items():
            assert torch.equal(value, again.adamw.state[two][key]), (name, key)


def test_a_checkpoint_with_other_parameters_is_refused(tmp_path: Path) -> None:
    make().save(tmp_path)
    fewer = Two()
    fewer.b.bias.requires_grad_(False)
    with pytest.raises(UserError, match=r"does not fit the recipe: parameter b\.bias"):
        make(fewer).load(tmp_path)


@pytest.mark.parametrize(("saved", "ours"), [(1, 5), (5, 1), (3, 4)])
def test_a_checkpoint_with_other_shapes_is_refused(tmp_path: Path, saved: int, ours: int) -> None:
    """A width of 1 would spread over any other without a word, as an adapter of rank 1 over one of rank 16."""

    def wide(width: int) -> LocalEngine:
        model = Two()
        model.b = nn.Linear(width, 2)
        return make(model)

    wide(saved).save(tmp_path)
    engine = wide(ours)
    before = weights(engine)
    with pytest.raises(UserError, match=r"does not fit the recipe: parameter b\.weight"):
        engine.load(tmp_path)
    assert all(torch.equal(before[name], p) for name, p in weights(engine).items()), "nothing was half loaded"


def test_a_group_is_stepped_whole_whatever_a_users_deepspeed_file_says(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 1000}}))
    found = settings(load_recipe("tiny", [f"launch.deepspeed_config={file}"]))
    assert found["zero_optimization"]["sub_group_size"] > 10**12  # DeepSpeed calls the optimiser once a sub-group


def test_a_users_deepspeed_file_with_unknown_places_is_refused(tmp_path: Path) -> None:
    for zero in ({"stage": 2, "round_robin_gradients": True}, {"stage": 3, "offload_optimizer": {"device": "nvme"}}):
        file = tmp_path / "own.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        with pytest.raises(UserError, match="round_robin_gradients and state on NVMe"):
            settings(load_recipe("tiny", [f"launch.deepspeed_config={file}"]))


def only(engine: LocalEngine, group: str, value: float) -> None:
    """A gradient for one group, none for the other."""
    for name, parameter in engine.trainable().items():
        parameter.grad = torch.full_like(parameter, value) if name.startswith(group) else None


def test_a_step_in_parts_is_one_step() -> None:
    apart, whole = make(), make()
    for _ in range(3):
        set_grads(whole, a_weight=[2.0] * 2, a_bias=[2.0], b_weight=[-0.1] * 6, b_bias=[-0.1] * 2)
        expected = whole.step(BOTH, 0.5).grad_norms
        only(apart, "a", 2.0)
        part = apart.step(["first"], 0.5)
        assert apart.grads("first") == [], "its memory is free"
        only(apart, "b", -0.1)
        assert part.grad_norms | apart.step(["second"], 0.5).grad_norms == expected
    assert all(torch.equal(weights(apart)[name], each) for name, each in weights(whole).items())


def test_a_bad_part_skips_what_follows_and_a_bad_rest_only_itself() -> None:
    engine = make(max_skipped_steps=5)
    start = weights(engine)
    only(engine, "a", math.nan)
    assert engine.step(["first"]).non_finite == "first.weight.grad"
    only(engine, "b", 1.0)
    assert engine.step(["second"]).non_finite == "first.weight.grad"
    assert all(torch.equal(start[name], each) for name, each in weights(engine).items())
    assert (engine.skipped_steps, engine.grads("second")) == (1, [])
    only(engine, "a", 1.0)
    assert engine.step(["first"]).non_finite == ""
    only(engine, "b", math.nan)
    assert engine.step(["second"]).non_finite == "second.weight.grad"
    moved = {name for name, each in weights(engine).items() if not torch.equal(start[name], each)}
    assert moved == {"a.weight", "a.bias"}
    assert (engine.skipped_steps, engine.skipped_in_a_row) == (2, 2)


def test_a_weight_with_gaps_is_stepped_as_torchs_plain_adamw_does() -> None:
    """The fused kernel takes a tensor to lie without gaps."""
    model, plain = Two(), Two()
    for each in (model, plain):
        each.b.weight = nn.Parameter(torch.arange(12.0).view(2, 6)[:, ::2])
    engine, reference = make(model), torch.optim.AdamW(plain.b.parameters(), 0.01, (0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        for parameter in (*model.b.parameters(), *plain.b.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1)
        engine.step(BOTH)
        reference.step()
    assert torch.allclose(model.b.weight, plain.b.weight)
