"""The losses of PPO-ptx and their gradients, held to numbers worked by hand, with harmless and with absurd padding."""

from __future__ import annotations

import math

import pytest
import torch
from test_objectives import Rows, assert_rows, draws, flat, junk, mask_of, padded

from rlhf.functional.ppo import policy_loss, ptx_loss, value_loss

# --- policy loss ------------------------------------------------------------------------------------------------------

# (advantage, ratio, loss, clipped, d loss / d logprob) at clip 0.2; the slope of -A ratio in the log-ratio is -A ratio.
POLICY_CASES = [
    (3.0, 1.5, -3.6, True, 0.0),  # good token already much likelier: max(-4.5, -3.6), flat
    (3.0, 0.5, -1.5, False, -1.5),  # good token that became rarer: max(-1.5, -2.4)
    (-2.0, 1.5, 3.0, False, 3.0),  # bad token that became likelier: max(3, 2.4)
    (-2.0, 0.5, 1.6, True, 0.0),  # bad token already much rarer: max(1, 1.6), flat
    (0.5, 1.1, -0.55, False, -0.55),  # within the bounds, both branches agree
    (-0.5, 0.85, 0.425, False, 0.425),
]


@pytest.mark.parametrize("case", POLICY_CASES)
def test_policy_loss_of_one_token(case: tuple[float, float, float, bool, float]) -> None:
    advantage, ratio, loss, clipped, slope = case
    old = torch.tensor([[-1.7]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    got = policy_loss(new, old, torch.tensor([[advantage]]).double(), torch.ones(1, 1, dtype=torch.bool), 0.2)
    assert got.loss.item() == pytest.approx(loss)
    assert float(got.clipped) == float(clipped)
    got.loss.backward()
    assert float(new.grad) == pytest.approx(slope, abs=1e-12)


@junk
def test_policy_loss_of_a_batch_is_the_sum_over_real_tokens(junk: float) -> None:
    # Rows of the cases above: -3.6 - 1.5 + 3, then 1.6 - 0.55, then 0.425.
    split = [POLICY_CASES[:3], POLICY_CASES[3:5], POLICY_CASES[5:]]
    old_rows = [[-1.0] * len(cases) for cases in split]
    mask = mask_of(old_rows)
    new = padded([[-1.0 + math.log(c[1]) for c in cases] for cases in split], junk).requires_grad_()
    got = policy_loss(new, padded(old_rows, junk), padded([[c[0] for c in cases] for cases in split], junk), mask, 0.2)
    assert got.loss.item() == pytest.approx(-0.625)
    assert float(got.clipped) == 2.0
    assert float(got.ratio_max) == pytest.approx(1.5)
    assert float(got.ratio_error) == pytest.approx(0.5)
    # k3 of the sampling policy against the new one: (ratio - 1) - ln ratio.
    ratios = [c[1] for c in POLICY_CASES]
    assert float(got.approx_kl) == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))
    for stat in (got.clipped, got.ratio_max, got.ratio_error, got.approx_kl):
        assert not stat.requires_grad
    got.loss.backward()
    assert_rows(new.grad, [[c[4] for c in cases] for cases in split])


@junk
def test_ratio_statistics_when_every_ratio_is_below_one(junk: float) -> None:
    # 0.5 and 0.25: the largest is 0.5, the farthest from 1 is 0.25; padding is no token and has no ratio.
    old, rows = [[-1.0], [-1.0]], [[-1.0 + math.log(0.5)], [-1.0 + math.log(0.25)]]
    got = policy_loss(padded(rows, junk), padded(old, junk), padded([[1.0], [1.0]], junk), mask_of(rows), 0.2)
    assert float(got.ratio_max) == pytest.approx(0.5)
    assert float(got.ratio_error) == pytest.approx(0.75)


def test_policy_loss_without_a_change_is_minus_the_advantages() -> None:
    old, advantages = draws(7, -3.0, -0.1), draws(8)
    new = padded(old, 0.0).requires_grad_()
    got = policy_loss(new, padded(old, 0.0), padded(advantages, 0.0), mask_of(old), 0.2)
    assert got.loss.item() == pytest.approx(-sum(flat(advantages)))
    assert (float(got.clipped), float(got.ratio_max), float(got.ratio_error), float(got.approx_kl)) == (0, 1, 0, 0)
    got.loss.backward()
    assert_rows(new.grad, [[-a for a in row] for row in advantages])


# --- value loss -------------------------------------------------------------------------------------------------------

# (V, V_old, G, loss, d loss / d V) at clip 0.2
VALUE_CASES = [
    (1.1, 1.0, 2.0, 0.405, -0.9),  # within the bounds: 0.5 x 0.9^2
    (1.5, 1.0, 2.0, 0.32, 0.0),  # moved towards the target beyond the bound: 0.5 x (1.2 - 2)^2 > 0.5 x 0.5^2, flat
    (1.5, 1.0, 0.0, 1.125, 1.5),  # moved away: 0.5 x 1.5^2 > 0.5 x 1.2^2
    (0.5, 1.0, 0.0, 0.32, 0.0),  # towards, downwards: 0.5 x (0.8 - 0)^2 > 0.5 x 0.5^2, flat
    (0.5, 1.0, 2.0, 1.125, -1.5),  # away, downwards: 0.5 x 1.5^2 > 0.5 x (0.8 - 2)^2
    (-1.9, -2.0, -3.0, 0.605, 1.1),  # within: 0.5 x 1.1^2
]


@junk
def test_value_loss_and_its_gradient(junk: float) -> None:
    split = [VALUE_CASES[:1], VALUE_CASES[1:5], VALUE_CASES[5:]]

    def column(k: int) -> Rows:
        return [[case[k] for case in cases] for cases in split]

    values = padded(column(0), junk).requires_grad_()
    got = value_loss(values, padded(column(1), junk), padded(column(2), junk), mask_of(split), 0.2)
    assert got.item() == pytest.approx(3.9)  # 0.405 + 0.32 + 1.125 + 0.32 + 1.125 + 0.605
    got.backward()
    assert_rows(values.grad, column(4))


@pytest.mark.parametrize("case", VALUE_CASES)
def test_value_loss_of_one_token(case: tuple[float, float, float, float, float]) -> None:
    value, old, target = (torch.tensor([[x]], dtype=torch.float64) for x in case[:3])
    value.requires_grad_()
    got = value_loss(value, old, target, torch.ones(1, 1, dtype=torch.bool), 0.2)
    got.backward()
    assert (got.item(), value.grad.item()) == pytest.approx(case[3:])


# --- ptx --------------------------------------------------------------------------------------------------------------


@junk
def test_ptx_loss_is_a_plus_sign_times_the_sum(junk: float) -> None:
    rows = [[0.5, 1.0, 2.5], [3.0]]
    nll = padded(rows, junk).requires_grad_()
    got = ptx_loss(nll, mask_of(rows), 27.8)
    assert got.item() == pytest.approx(194.6)  # 27.8 x 7
    got.backward()
    assert_rows(nll.grad, [[27.8] * 3, [27.8]])
