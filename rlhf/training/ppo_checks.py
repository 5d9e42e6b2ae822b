"""Checks of a PPO run on itself: the ratio is 1 and the KL 0 at the start, and the policy stays near the reference."""

from __future__ import annotations

import torch

from rlhf.errors import UserError
from rlhf.rollout.experience import ScoredEpisodes
from rlhf.training.ppo_state import Ppo


def check_first_minibatch(ppo: Ppo, experience: ScoredEpisodes, ratio_error: float) -> None:
    """Check that the ratio is 1 before the updates of an iteration, and the KL 0 before the first update of the run.

    Raises UserError, with the likely causes, if either is off by more than ppo.ratio_tolerance.
    """
    tolerance = ppo.recipe.ppo.ratio_tolerance
    if not ratio_error <= tolerance:  # so that nan does not pass, here and below
        raise UserError(
            f"the probability ratio is off by {ratio_error:.2g} before any update of iteration {ppo.iteration}",
            where="ppo.ratio_tolerance",
            fix="likely causes: dropout left on, sampling that is not the plain softmax, a rollout engine with other "
            "weights or kernels, or bfloat16 with a tolerance meant for float32",
        )
    gap = float(torch.where(experience.mask, experience.logprobs - experience.ref_logprobs, 0.0).abs().max())
    if ppo.iteration == 0 and not gap <= tolerance:
        what = f"policy and reference differ by {gap:.2g} nats on a token before the first update, so KL is not 0"
        fix = "likely causes: the reference is not the SFT model the policy started from, or dropout is on"
        raise UserError(what, "ppo.ratio_tolerance", fix)


def check_kl(ppo: Ppo) -> None:
    """Raise UserError if the KL of the last iteration's responses to the reference is beyond ppo.max_kl, in nats."""
    if not ppo.metrics["ppo/kl"] <= ppo.recipe.ppo.max_kl:
        what = f"KL to the reference reached {ppo.metrics['ppo/kl']:.1f} nats per response"
        fix = "lower ppo.lr or raise ppo.kl_coef; the sealed checkpoints of this run are kept"
        raise UserError(what, "ppo.max_kl", fix)
