"""What evaluation keeps and reports: the answers of each policy, their summary, the headline and the sample rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rlhf.evaluation.heldout import HeldOut
from rlhf.functional.statistics import Interval, distinct_n, length_statistics
from rlhf.labeling.base import Output
from rlhf.rollout.sampling import Rollout


@dataclass
class Answers:
    """One policy's answers; rows in the order of Questions.ids."""

    rollout: Rollout
    texts: list[str]
    tax: dict[str, Any]
    prompted: str = ""  # the template that it answered under
    kl: list[float] = field(default_factory=list)  # k1 summed over each response, nats; empty under a template
    kl_k3: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # empty without a reward model

    def outputs(self, samples: int) -> list[list[Output]]:
        """[prompts][samples], as the labeler takes them."""
        flat = [
            Output(text, finished) for text, finished in zip(self.texts, self.rollout.finished.tolist(), strict=True)
        ]
        return group_by_prompt(flat, samples)


def group_by_prompt(rows: list, samples: int) -> list[list]:
    """A flat list as [prompts][samples]."""
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


def interval_row(rate: Interval, n: int) -> dict[str, float]:
    """A win rate as results.json holds it."""
    return {"win_rate": rate.mean, "low": rate.low, "high": rate.high, "n": n}


def summarise(answer: Answers) -> dict[str, Any]:
    """One policy's numbers; lengths in tokens including EOS, KL in nats per response."""
    return {
        "responses": len(answer.texts),
        "prompted": answer.prompted,
        "reward_score": fmean(answer.scores) if answer.scores else None,
        "kl": fmean(answer.kl) if answer.kl else None,
        "kl_k3": fmean(answer.kl_k3) if answer.kl_k3 else None,
        "response_length": length_statistics(answer.rollout.lengths.tolist()),
        "finished_fraction": float(answer.rollout.finished.float().mean()),
        "distinct_1": distinct_n(answer.texts, 1),
        "distinct_2": distinct_n(answer.texts, 2),
        **answer.tax,
    }


def headline(results: dict[str, Any]) -> dict[str, float]:
    """The numbers that stage.json and wandb get: evaluate/<measure>/<policy>."""
    flat = {}
    for name, row in results["policies"].items():
        for key in ("reward_score", "kl", "finished_fraction", "distinct_2", "pretraining_loss", "cloze_accuracy"):
            if row.get(key) is not None:
                flat[f"evaluate/{key}/{name}"] = row[key]
        flat[f"evaluate/response_length/{name}"] = row["response_length"]["mean"]
    for row in results["comparisons"]:
        if row["b"] == "sft":
            for key, suffix in (("win_rate", ""), ("low", "_low"), ("high", "_high")):
                flat[f"evaluate/win_rate{suffix}/{row['a']}"] = row[key]
    return flat


def sample_rows(
    asked: HeldOut, answers: dict[str, Answers], over_sft: dict[str, list[float]], samples: int
) -> list[dict[str, Any]]:
    """samples.jsonl: a prompt with every policy's response, its length, score, KL and its win over SFT."""
    rows = []
    for i in range(len(asked.ids)):
        prompt = asked.prompts[i // samples]
        rows.append(
            {
                "prompt": prompt.text,
                "use_case": prompt.use_case,
                "sample": i % samples,
                "responses": {name: a.texts[i] for name, a in answers.items()},
                "finished": {name: bool(a.rollout.finished[i]) for name, a in answers.items()},
                "lengths": {name: int(a.rollout.lengths[i]) for name, a in answers.items()},
                "scores": {name: a.scores[i] for name, a in answers.items() if a.scores},
                "kl": {name: a.kl[i] if a.kl else None for name, a in answers.items()},
                "wins_over_sft": {name: wins[i] for name, wins in over_sft.items()},
            }
        )
    return rows
