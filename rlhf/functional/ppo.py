"""Compute PPO and PPO-ptx: rewards, advantages, losses, KL control. All are pure functions of tensors.

Notation: B episodes, R response positions (right-padded), T_i the length of response i including its EOS when it has
one. `lengths` [B] int64 holds the T_i; `mask` [B, R] bool is True on the T_i real positions. Masks come from lengths,
never from token ids, since the padding id may equal EOS. All log-probabilities are natural logarithms at the sampling
temperature; all KL are in nats. Losses are sums over tokens: the caller divides by the token count of the global
minibatch, so that neither micro-batches nor the number of processes changes the gradient.

Sources: Ouyang et al. 2022 (arXiv 2203.02155, "the paper") for the objective, Schulman et al. 2016 (1506.02438) for
GAE, Schulman et al. 2017 (1707.06347) for the clipped loss, Ziegler et al. 2019 (1909.08593) for the adaptive KL
coefficient, and Schulman's note "Approximating KL divergence" (2020) for the k1 and k3 estimators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return a mask [B, width] bool, True on the first `lengths[i]` positions of row i."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the True positions; values elsewhere have no effect, inf and nan included."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the True positions; 0 if there are none."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log p - log q per token: an unbiased estimate of KL(p || q) on samples of p; it can be negative."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (q/p - 1) - log(q/p) per token: an unbiased estimate of KL(p || q) on samples of p, never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def per_token_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    lengths: Tensor,
    finished: Tensor,
    kl_coef: float,
    missing_eos_penalty: float = 0.0,
) -> Tensor:
    """Return R_t = -beta (log pi_old(a_t) - log pi_ref(a_t)) + [t = T] (r(x, y) - penalty if y has no EOS).

    This is the reward of the paper's equation 2 (section 3.5), written per token: [B, R], zero on padding.

    Args:
        logprobs, ref_logprobs: [B, R], log-probabilities of the sampled tokens: of the sampling policy pi_old, and of
            the reference pi_ref (the SFT policy).
        scores: [B], normalised reward-model scores r(x, y).
        lengths: [B], the T of each response.
        finished: [B] bool, whether the response ended with EOS.
        kl_coef: beta, per nat.
    """
    mask = length_mask(lengths, logprobs.shape[1])
    rewards = torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), torch.zeros_like(logprobs))
    final = scores - missing_eos_penalty * (~finished).to(scores.dtype)
    return rewards.scatter_add(1, (lengths - 1)[:, None], final[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns by generalised advantage estimation (Schulman et al. 2016, equation 16).

    delta_t = R_t + gamma V_{t+1} - V_t with V_{T+1} = 0, and A_t = sum_l (gamma lam)^l delta_{t+l}.

    `rewards` and `values` are [B, R]; V_t is the value of the state in which token t is chosen. `lengths` [B] are the T
    of the responses. Advantages A_t and returns A_t + V_t are [B, R], both zero on padding.
    """
    mask = length_mask(lengths, rewards.shape[1])
    zeros = torch.zeros_like(rewards)
    rewards, values = torch.where(mask, rewards, zeros), torch.where(mask, values, zeros)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Padding has zero reward, value and running advantage, so that the last real token sees V_{T+1} = 0.
        running = torch.where(mask[:, t], delta + gamma * lam * running, torch.zeros_like(running))
        advantages[:, t] = running
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return (values - mean) / std, plus the mean where `shift_mean` is False.

    Moments are taken over the True positions; the variance is the population one. Padding is zero in the result.
    """
    count = mask.sum().to(torch.float64).clamp(min=1)
    mean = masked_sum(values.double(), mask) / count
    variance = masked_sum((values.double() - mean) ** 2, mask) / count
    whitened = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened)).to(values.dtype)


@dataclass
class PolicyLoss:
    """The policy loss of a micro-batch and its statistics, all scalars; only `loss` carries the gradient."""

    loss: Tensor  # sum over the real tokens
    clipped: Tensor  # number of tokens whose loss the clipping has changed
    ratio_max: Tensor
    ratio_error: Tensor  # largest |ratio - 1|
    approx_kl: Tensor  # sum over tokens of the k3 estimate of KL(pi_old || pi)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> PolicyLoss:
    """Return the clipped surrogate loss summed over tokens (Schulman et al. 2017, equation 7).

    max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) with ratio = pi(a_t) / pi_old(a_t). All tensors are [B, R];
    `logprobs` and `old_logprobs` are those of the sampled tokens under pi and pi_old.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        stats = (
            masked_sum((clipped > plain).to(ratio.dtype), mask),
            torch.where(mask, ratio, torch.zeros_like(ratio)).max(),
            (ratio - 1).abs().max(),
            masked_sum(kl_k3(old_logprobs, logprobs), mask),
        )
    return PolicyLoss(masked_sum(torch.maximum(plain, clipped), mask), *stats)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Return the clipped value loss summed over tokens.

    0.5 max((V - G)^2, (clamp(V, V_old - clip, V_old + clip) - G)^2), as in OpenAI's PPO code (baselines, ppo2); the
    papers do not clip values. All tensors are [B, R]: V now, V_old at the time of sampling, the returns G of `gae`.
    """
    # Masked first: behind a square, nan or inf on padding would come back as a nan gradient.
    values, old_values, returns = (torch.where(mask, x, torch.zeros_like(x)) for x in (values, old_values, returns))
    bounded = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    error = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    return (0.5 * error).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(G - V) / Var(G) over the real tokens; 0 if the returns G do not vary."""
    if int(mask.sum()) == 0:
        return torch.zeros((), dtype=values.dtype)
    target, error = returns[mask], (returns - values)[mask]
    variance = target.var(unbiased=False)
    explained = 1 - error.var(unbiased=False) / variance.clamp(min=1e-12)
    return torch.where(variance > 0, explained, torch.zeros_like(variance))


def ptx_loss(token_nll: Tensor, mask: Tensor, ptx_coef: float) -> Tensor:
    """Return ptx_coef times the sum of -log pi(token) over pretraining tokens [B, L].

    The caller divides by the number of tokens. Equation 2 of the paper (section 3.5) adds gamma E[log pi(x)] to the
    objective, which is to be maximised; in a loss that is the sum of -log pi with a plus sign.
    """
    return ptx_coef * masked_sum(token_nll, mask)


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Return the next beta: beta (1 + clamp((KL - target) / target, -0.2, 0.2) episodes / horizon).

    Ziegler et al. 2019, section 2.2, with episodes / horizon of their code for the gain K. `kl` and `target` are
    in nats per response.
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


@torch.no_grad()
def ema_update(average: dict[str, Tensor], parameters: dict[str, Tensor], decay: float) -> None:
    """Set average <- decay average + (1 - decay) parameters, in place (paper, appendix C.4: decay 0.992)."""
    for name, mean in average.items():
        mean.mul_(decay).add_(parameters[name].detach().to(mean.device, mean.dtype), alpha=1 - decay)
