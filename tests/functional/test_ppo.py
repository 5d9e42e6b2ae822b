"""The arithmetic of PPO-ptx, held to numbers worked by hand and to plain loops.

The loops are Python in double precision, without tensors. Rows have different lengths and a column that
no row reaches; every test runs with harmless and with absurd padding.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from rlhf.functional import ppo
from support.tensors import LENGTHS, WIDTH, Rows, assert_rows, draws, flat, junk, mask_of, padded

# --- masks ------------------------------------------------------------------------------------------------------------


def test_length_mask_by_hand() -> None:
    assert ppo.length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


@junk
def test_masked_sum_and_mean(junk: float) -> None:
    rows = [[1.0, 2.0], [6.0]]
    values, mask = padded(rows, junk), mask_of(rows)
    assert float(ppo.masked_sum(values, mask)) == 9.0
    assert float(ppo.masked_mean(values, mask)) == 3.0
    assert float(ppo.masked_mean(values, torch.zeros_like(mask))) == 0.0
    assert float(ppo.masked_mean(padded([[6.0]], junk), mask_of([[6.0]]))) == 6.0


# --- KL estimators ----------------------------------------------------------------------------------------------------


def test_k1_and_k3_by_hand() -> None:
    p, q = torch.tensor([0.5], dtype=torch.float64).log(), torch.tensor([0.25], dtype=torch.float64).log()
    assert float(ppo.kl_k1(p, q)) == pytest.approx(0.6931471805599453)  # ln 0.5 - ln 0.25 = ln 2
    assert float(ppo.kl_k3(p, q)) == pytest.approx(0.1931471805599453)  # (0.25 / 0.5 - 1) - ln(0.5) = -0.5 + ln 2


def test_both_estimators_have_the_true_kl_as_their_mean() -> None:
    """Exact enumeration: the mean under p of either estimate over every outcome is sum p ln(p / q)."""
    p, q = [0.5, 0.3, 0.15, 0.05], [0.1, 0.4, 0.3, 0.2]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    for estimate in (ppo.kl_k1, ppo.kl_k3):
        mean = sum(
            a * float(estimate(torch.tensor(math.log(a)).double(), torch.tensor(math.log(b)).double()))
            for a, b in zip(p, q, strict=True)
        )
        assert mean == pytest.approx(kl, abs=1e-7)


def test_k3_is_never_negative_and_exact_for_tiny_differences() -> None:
    gaps = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert bool((ppo.kl_k3(torch.zeros_like(gaps), gaps) >= 0).all())
    # x^2 / 2 + x^3 / 6 with x = 1e-8; exp(x) - 1 - x would be rounding noise of about 1e-17.
    tiny = float(ppo.kl_k3(torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e-8, dtype=torch.float64)))
    assert tiny == pytest.approx(5e-17, rel=1e-4)


# --- rewards ----------------------------------------------------------------------------------------------------------


@junk
def test_per_token_rewards_by_hand(junk: float) -> None:
    logprobs = padded([[-1.0, -2.0, -0.5], [-0.2], [-1.0, -3.0]], junk)
    reference = padded([[-1.5, -1.0, -0.5], [-0.7], [-2.0, -1.0]], junk)
    scores = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    lengths, finished = torch.tensor([3, 1, 2]), torch.tensor([False, True, False])
    got = ppo.per_token_rewards(logprobs, reference, scores, lengths, finished, 0.1, 0.25)
    # row 1: -0.1 x 0.5, -0.1 x -1, -0.1 x 0 + 2 - 0.25; row 2: -0.1 x 0.5 - 1, it has its EOS;
    # row 3: -0.1 x 1, -0.1 x -2 + 0.5 - 0.25
    assert_rows(got, [[-0.05, 0.1, 1.75], [-1.05], [-0.1, 0.45]])
    # Without the penalty: 2 and 0.5 whole.
    got = ppo.per_token_rewards(logprobs, reference, scores, lengths, finished, 0.1)
    assert_rows(got, [[-0.05, 0.1, 2.0], [-1.05], [-0.1, 0.7]])


@junk
def test_the_rewards_of_a_response_add_up_to_score_minus_beta_kl(junk: float) -> None:
    ours, reference, scores = draws(1), draws(2), [0.3, -1.2, 2.0, 0.0]
    grids, lengths = (padded(ours, junk), padded(reference, junk)), torch.tensor(LENGTHS)
    finished = torch.ones(4, dtype=torch.bool)
    got = ppo.per_token_rewards(*grids, torch.tensor(scores).double(), lengths, finished, 0.02)
    for i, row in enumerate(got):
        kl = sum(a - b for a, b in zip(ours[i], reference[i], strict=True))
        assert float(row.sum()) == pytest.approx(scores[i] - 0.02 * kl, abs=1e-7)


def test_rewards_keep_the_type_of_the_logprobs() -> None:
    zeros, score = torch.zeros(1, 2), torch.tensor([1.0]).double()
    got = ppo.per_token_rewards(zeros, zeros, score, torch.tensor([2]), torch.tensor([True]), 0.1)
    assert got.dtype == torch.float32 and got.tolist() == [[0.0, 1.0]]


# --- advantages -------------------------------------------------------------------------------------------------------


@junk
def test_gae_by_hand(junk: float) -> None:
    # gamma = lambda = 0.5. Row 1: delta_3 = 3 + 0 + 1 = 4; delta_2 = 2 - 0.5 - 1 = 0.5; delta_1 = 1 + 0.5 - 0.5 = 1;
    # A_3 = 4; A_2 = 0.5 + 0.25 x 4 = 1.5; A_1 = 1 + 0.25 x 1.5 = 1.375. Row 2: A_1 = 2 - 0.5.
    rewards, values = padded([[1.0, 2.0, 3.0], [2.0]], junk), padded([[0.5, 1.0, -1.0], [0.5]], junk)
    advantages, returns = ppo.gae(rewards, values, torch.tensor([3, 1]), gamma=0.5, lam=0.5)
    assert_rows(advantages, [[1.375, 1.5, 4.0], [1.5]])
    assert_rows(returns, [[1.875, 2.5, 3.0], [2.0]])


def test_gae_of_single_tokens() -> None:
    # The only token: R - V, whatever gamma and lambda.
    rewards, values = torch.tensor([[2.0], [1.0]]), torch.tensor([[0.5], [3.0]])
    advantages, returns = ppo.gae(rewards, values, torch.tensor([1, 1]), 0.9, 0.8)
    assert advantages.tolist() == [[1.5], [-2.0]] and returns.tolist() == [[2.0], [1.0]]


@junk
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("width", [WIDTH, max(LENGTHS)])
def test_gae_is_the_double_sum(junk: float, gamma: float, lam: float, width: int) -> None:
    rewards, values = draws(3), draws(4)
    grids = padded(rewards, junk, width), padded(values, junk, width)
    advantages, returns = ppo.gae(*grids, torch.tensor(LENGTHS), gamma, lam)
    expected: Rows = []
    for r, v in zip(rewards, values, strict=True):
        after = [*v[1:], 0.0]
        deltas = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        expected.append([sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))])
    assert_rows(advantages, expected)
    assert_rows(returns, [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(expected, values, strict=True)])
    if gamma == lam == 1:  # returns are then the rewards to come
        assert_rows(returns, [[sum(row[t:]) for t in range(len(row))] for row in rewards])


# --- whitening --------------------------------------------------------------------------------------------------------


@junk
def test_whiten_by_hand(junk: float) -> None:
    # Mean 2.5, population variance (2 x 1.5^2 + 2 x 0.5^2) / 4 = 1.25: -1.5 / 1.25^0.5 = -1.3416407865.
    rows = [[1.0, 4.0], [2.0], [3.0]]
    expected = [[-1.3416407865, 1.3416407865], [-0.4472135955], [0.4472135955]]
    assert_rows(ppo.whiten(padded(rows, junk), mask_of(rows)), expected, 1e-7)
    kept = [[x + 2.5 for x in row] for row in expected]
    assert_rows(ppo.whiten(padded(rows, junk), mask_of(rows), shift_mean=False), kept, 1e-7)


@junk
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_of_uneven_rows(junk: float, shift_mean: bool) -> None:
    rows = [[5.0, -1.0, 2.0], [0.5], [3.0, 3.5], [9.0, -4.0, 0.0, 1.0]]
    mean, std = statistics.fmean(flat(rows)), statistics.pstdev(flat(rows))
    expected = [[(x - mean) / std + (0 if shift_mean else mean) for x in row] for row in rows]
    assert_rows(ppo.whiten(padded(rows, junk), mask_of(rows), shift_mean), expected, 1e-7)


def test_whiten_of_equal_values_and_of_nothing_is_zero() -> None:
    rows = [[3.0, 3.0], [3.0]]
    assert_rows(ppo.whiten(padded(rows, 7.0), mask_of(rows)), [[0.0, 0.0], [0.0]])
    assert_rows(ppo.whiten(padded([[3.0]], 7.0), mask_of([[3.0]])), [[0.0]])
    assert float(ppo.whiten(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).abs().sum()) == 0.0


def test_whiten_computes_in_double_and_keeps_the_type() -> None:
    # 1, 2 and 4 above 10 million: mean 7/3, variance (16 + 1 + 25) / 27 = 14/9. In float32 neither their sum nor their
    # mean exists.
    values = torch.tensor([[1e7 + 1, 1e7 + 2, 1e7 + 4]], dtype=torch.float32)
    got = ppo.whiten(values, torch.ones(1, 3, dtype=torch.bool))
    assert got.dtype == torch.float32
    assert got.tolist()[0] == pytest.approx([-1.0690450, -0.2672612, 1.3363062], abs=1e-6)


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
    got = ppo.policy_loss(new, old, torch.tensor([[advantage]]).double(), torch.ones(1, 1, dtype=torch.bool), 0.2)
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
    advantages = padded([[c[0] for c in cases] for cases in split], junk)
    got = ppo.policy_loss(new, padded(old_rows, junk), advantages, mask, 0.2)
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
    got = ppo.policy_loss(padded(rows, junk), padded(old, junk), padded([[1.0], [1.0]], junk), mask_of(rows), 0.2)
    assert float(got.ratio_max) == pytest.approx(0.5)
    assert float(got.ratio_error) == pytest.approx(0.75)


def test_policy_loss_without_a_change_is_minus_the_advantages() -> None:
    old, advantages = draws(7, -3.0, -0.1), draws(8)
    new = padded(old, 0.0).requires_grad_()
    got = ppo.policy_loss(new, padded(old, 0.0), padded(advantages, 0.0), mask_of(old), 0.2)
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
    got = ppo.value_loss(values, padded(column(1), junk), padded(column(2), junk), mask_of(split), 0.2)
    assert got.item() == pytest.approx(3.9)  # 0.405 + 0.32 + 1.125 + 0.32 + 1.125 + 0.605
    got.backward()
    assert_rows(values.grad, column(4))


@pytest.mark.parametrize("case", VALUE_CASES)
def test_value_loss_of_one_token(case: tuple[float, float, float, float, float]) -> None:
    value, old, target = (torch.tensor([[x]], dtype=torch.float64) for x in case[:3])
    value.requires_grad_()
    got = ppo.value_loss(value, old, target, torch.ones(1, 1, dtype=torch.bool), 0.2)
    got.backward()
    assert (got.item(), value.grad.item()) == pytest.approx(case[3:])


# --- ptx --------------------------------------------------------------------------------------------------------------


@junk
def test_ptx_loss_is_a_plus_sign_times_the_sum(junk: float) -> None:
    rows = [[0.5, 1.0, 2.5], [3.0]]
    nll = padded(rows, junk).requires_grad_()
    got = ppo.ptx_loss(nll, mask_of(rows), 27.8)
    assert got.item() == pytest.approx(194.6)  # 27.8 x 7
    got.backward()
    assert_rows(nll.grad, [[27.8] * 3, [27.8]])


# --- explained variance -----------------------------------------------------------------------------------------------


@junk
def test_explained_variance(junk: float) -> None:
    # Var(G) of 0.1, 0.2, 0.3, 0.4 is 0.0125; G - V is 0, 0, 0, 0.1 with variance 0.0025 - 0.000625 = 0.001875.
    targets, values = [[0.1, 0.2, 0.3], [0.4]], [[0.1, 0.2, 0.3], [0.3]]
    mask = mask_of(targets)
    assert float(ppo.explained_variance(padded(values, junk), padded(targets, junk), mask)) == pytest.approx(0.85)
    flat_targets, wild = padded([[2.0, 2.0, 2.0], [2.0]], junk), padded([[1.0, 3.0, 1.0], [2.0]], junk)
    assert float(ppo.explained_variance(wild, flat_targets, mask)) == 0.0
    assert float(ppo.explained_variance(padded(values, junk), padded(targets, junk), torch.zeros_like(mask))) == 0.0


def test_explained_variance_of_a_bad_model_is_negative() -> None:
    # Predicting -G: the error is 2 G, its variance 4 Var(G), so 1 - 4.
    targets = draws(9)
    values = [[-x for x in row] for row in targets]
    got = ppo.explained_variance(padded(values, 0.0), padded(targets, 0.0), mask_of(targets))
    assert got.item() == pytest.approx(-3.0)


# --- KL control, EMA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.100064),  # error 0.1: 0.1 x (1 + 0.1 x 64 / 10000)
        (5.1, 0.099904),  # error -0.15
        (7.2, 0.100128),  # error 0.2, at the bound
        (60.0, 0.100128),  # error 9, held at 0.2
        (4.0, 0.099872),  # error -1/3, held at -0.2
        (-5.0, 0.099872),  # the estimate can be negative
    ],
)
def test_adaptive_kl_coef(kl: float, expected: float) -> None:
    assert ppo.adaptive_kl_coef(0.1, kl, target=6.0, episodes=64, horizon=10000) == pytest.approx(expected, rel=1e-12)


def test_ema_by_hand_and_after_many_steps() -> None:
    average = {"w": torch.tensor([1.0, -1.0])}
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    same = average["w"]
    ppo.ema_update(average, {"w": weight, "other": torch.zeros(1)}, 0.9)
    assert average["w"] is same and list(average) == ["w"] and not same.requires_grad
    assert same.tolist() == pytest.approx([1.1, -0.6])  # 0.9 + 0.2, -0.9 + 0.3
    # Constant weights w from a start a: w + decay^n (a - w).
    average = {"w": torch.tensor([5.0], dtype=torch.float64)}
    for _ in range(50):
        ppo.ema_update(average, {"w": torch.tensor([1.0])}, 0.992)
    assert float(average["w"]) == pytest.approx(1 + 0.992**50 * 4, rel=1e-9)


def test_ema_is_kept_in_its_own_precision() -> None:
    average = {"w": torch.tensor([1.0])}
    ppo.ema_update(average, {"w": torch.tensor([2.0], dtype=torch.bfloat16)}, 0.992)
    assert average["w"].dtype == torch.float32 and float(average["w"]) == pytest.approx(1.008, rel=1e-6)
