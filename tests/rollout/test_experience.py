"""From a scored rollout to advantages and metrics, on three episodes worked by hand."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from rlhf.rollout.experience import Experience, ScoredEpisodes, pad_rows, summary
from rlhf.rollout.sampling import Rollout
from stages.ppo import advantages

# Three episodes of 3, 1 and 2 tokens; the second has no EOS.
LOGPROBS = [[-1.0, -2.0, -0.5], [-0.25], [-1.5, -3.0]]
REFERENCE = [[-1.5, -1.0, -0.5], [-0.75], [-2.0, -1.0]]
VALUES = [[0.5, 1.0, -1.0], [0.25], [0.0, 2.0]]
SCORES, FINISHED, LENGTHS = [2.0, -1.0, 0.5], [True, False, True], [3, 1, 2]
BETA, PENALTY, GAMMA, LAM = 0.1, 0.5, 0.9, 0.8
# -0.1 (log pi - log ref), and at the last token the score, less 0.5 where EOS is missing
REWARDS = [[-0.05, 0.1, 2.0], [-1.55], [-0.05, 0.7]]
junk = pytest.mark.parametrize("junk", [0.0, 1e9, math.nan, math.inf])


def make_rollout(junk: float) -> Rollout:
    def grid(rows: list, fill: float, width: int = 4) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    return Rollout(
        prompt_ids=torch.tensor([[0, 5], [6, 7], [0, 8]]),
        prompt_lengths=torch.tensor([1, 2, 1]),
        response_ids=grid([[10, 11, 2], [12], [13, 2]], 0),
        lengths=torch.tensor(LENGTHS),
        finished=torch.tensor(FINISHED),
        logprobs=grid(LOGPROBS, junk),
        end_id=2,
    )


def build(junk: float = 0.0, **changes: float) -> Experience:
    options = {"missing_eos_penalty": PENALTY, "gamma": GAMMA, "lam": LAM, "whiten_rewards": False}
    reference, values = ([torch.tensor(row) for row in rows] for rows in (REFERENCE, VALUES))
    scored = ScoredEpisodes.of(make_rollout(junk), reference, values, torch.tensor(SCORES))
    section = SimpleNamespace(**(options | changes))
    return advantages(SimpleNamespace(recipe=SimpleNamespace(ppo=section), kl_coef=BETA), scored)  # type: ignore[arg-type]


def advantages_of(rewards: list[list[float]]) -> list[list[float]]:
    """GAE as its double sum."""
    out = []
    for r, v in zip(rewards, VALUES, strict=True):
        after = [*v[1:], 0.0]
        deltas = [r[t] + GAMMA * after[t] - v[t] for t in range(len(r))]
        out.append([sum((GAMMA * LAM) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))])
    return out


def whitened(rows: list[list[float]], keep_mean: bool = False) -> list[list[float]]:
    everything = [x for row in rows for x in row]
    mean, std = statistics.fmean(everything), statistics.pstdev(everything)
    return [[(x - mean) / std + mean * keep_mean for x in row] for row in rows]


def assert_rows(got: torch.Tensor, expected: list[list[float]]) -> None:
    """Equal on the real positions, zero on padding."""
    for row, numbers in zip(got.tolist(), expected, strict=True):
        assert row == pytest.approx(numbers + [0.0] * (4 - len(numbers)), abs=2e-6)


def test_pad_rows() -> None:
    got = pad_rows([torch.tensor([1, 2]), torch.tensor([3], dtype=torch.bfloat16)], 3)
    assert got.dtype == torch.float32 and got.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]


@junk
def test_rewards_advantages_and_returns(junk: float) -> None:
    got = build(junk)
    expected = advantages_of(REWARDS)
    assert got.mask.tolist() == [[True, True, True, False], [True, False, False, False], [True, True, False, False]]
    assert_rows(got.rewards, REWARDS)
    assert_rows(got.advantages, whitened(expected))
    # The targets of the value model are not whitened.
    pairs = zip(expected, VALUES, strict=True)
    assert_rows(got.returns, [[a + v for a, v in zip(*pair, strict=True)] for pair in pairs])


@junk
def test_whitened_rewards_keep_their_mean_and_reach_the_advantages(junk: float) -> None:
    got = build(junk, whiten_rewards=True)
    rewards = whitened(REWARDS, keep_mean=True)
    assert_rows(got.rewards, rewards)
    assert_rows(got.advantages, whitened(advantages_of(rewards)))


def test_the_total_reward_is_that_before_whitening() -> None:
    for whiten_rewards in (False, True):
        expected = statistics.fmean(sum(row) for row in REWARDS)
        assert summary(build(whiten_rewards=whiten_rewards))["ppo/reward_total"] == pytest.approx(expected)


def test_what_was_measured_is_kept_as_it_was() -> None:
    got = build()
    assert got.pairs == [([5], [10, 11, 2]), ([6, 7], [12]), ([8], [13, 2])]
    assert got.finished.tolist() == FINISHED and got.scores.tolist() == SCORES
    assert_rows(got.logprobs, LOGPROBS)
    assert_rows(got.ref_logprobs, REFERENCE)
    assert_rows(got.values, VALUES)


@junk
def test_kl_per_response(junk: float) -> None:
    # 0.5 - 1 + 0; 0.5; 0.5 - 2
    assert build(junk).kl_per_response().tolist() == pytest.approx([-0.5, 0.5, -1.5])


@junk
def test_summary_by_hand(junk: float) -> None:
    experience = build(junk)
    got = summary(experience)
    gaps = [q - p for ps, qs in zip(LOGPROBS, REFERENCE, strict=True) for p, q in zip(ps, qs, strict=True)]
    # 1 - Var(G - V) / Var(G), where G - V are the advantages
    gains = [x for row in advantages_of(REWARDS) for x in row]
    returns = [a + v for a, v in zip(gains, [x for row in VALUES for x in row], strict=True)]
    assert got == pytest.approx(
        {
            "ppo/reward_score": 0.5,  # (2 - 1 + 0.5) / 3
            "ppo/reward_total": 1.15 / 3,  # 2.05 - 1.55 + 0.65, over three responses
            "ppo/kl": -0.5,  # (-0.5 + 0.5 - 1.5) / 3
            "ppo/kl_k3": sum(math.exp(x) - 1 - x for x in gaps) / 3,
            "ppo/value_mean": 2.75 / 6,
            "ppo/value_explained_variance": 1 - statistics.pvariance(gains) / statistics.pvariance(returns),
            "ppo/response_length": 2.0,
            "ppo/finished_fraction": 2 / 3,
        },
        rel=1e-5,
    )


def test_junk_on_the_padding_of_a_finished_experience_changes_no_metric() -> None:
    clean, dirty = build(), build()
    for grid in (dirty.logprobs, dirty.ref_logprobs, dirty.values, dirty.rewards, dirty.advantages, dirty.returns):
        grid[~dirty.mask] = math.nan
    assert summary(dirty) == summary(clean)
    assert torch.equal(dirty.kl_per_response(), clean.kl_per_response())
