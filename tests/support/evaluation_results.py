"""Give the content of a results.json of the evaluate stage."""

from __future__ import annotations

from typing import Any


def policy(loss: float, cloze: float, score: float | None, kl: float) -> dict[str, Any]:
    """Return what the evaluate stage writes of one policy."""
    length = {"mean": 31.25, "p10": 12, "median": 33, "p90": 40}
    held_out = {"responses": 20, "reward_score": score, "kl": kl, "kl_k3": kl, "response_length": length}
    texts = {"finished_fraction": 0.5, "distinct_1": 0.4, "distinct_2": 0.8}
    tax = {"pretraining_loss": loss, "pretraining_tokens": 12345, "cloze_accuracy": cloze, "cloze_n": 100}
    tax |= {"cloze_low": cloze - 0.1, "cloze_high": cloze + 0.1, "cloze_accuracy_sum": cloze}
    return held_out | texts | tax


def results(low: float = 0.55, high: float = 0.85) -> dict[str, Any]:
    """Return a whole results.json in which PPO-ptx wins 70% with this interval."""
    how = {"labeler": "rubric", "prompts": 20, "samples_per_prompt": 2, "judgements": 3, "temperature": 1.0}
    policies = {"sft": policy(3.4, 0.5, -0.004, 0.0), "ppo-ptx": policy(3.425, 0.48, 0.7, 5.25)}
    compared = {"a": "ppo-ptx", "b": "sft", "win_rate": 0.7, "low": low, "high": high, "n": 20, "length_matched": None}
    return how | {"bootstrap": 2000, "drops": [], "policies": policies, "comparisons": [compared]}
