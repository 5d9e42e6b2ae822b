"""The results of an evaluation: each policy's answers, their statistics, the headline metrics and the sample rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from rlhf.config import EvaluateSection
from rlhf.data.records import Drops
from rlhf.evaluation.heldout import HeldOut
from rlhf.functional.statistics import (
    Interval,
    distinct_n,
    length_matched_win_rate,
    length_statistics,
    prompt_means,
    win_rate,
)
from rlhf.labeling.base import Output
from rlhf.rollout.sampling import Rollout


@dataclass
class Answers:
    """One policy's answers; rows in the order of `HeldOut.ids`."""

    rollout: Rollout
    texts: list[str]
    tax: dict[str, Any] = field(default_factory=dict)  # its alignment tax; not measured under a template
    prompted: str = ""  # name of the template that it answered under
    kl: list[float] = field(default_factory=list)  # k1 summed over each response, nats; empty under a template
    kl_k3: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # empty without a reward model

    def outputs(self, samples: int) -> list[list[Output]]:
        """Return the responses as the labeler takes them, [prompts][samples]."""
        finished = self.rollout.finished.tolist()
        return group_by_prompt([Output(*row) for row in zip(self.texts, finished, strict=True)], samples)


class PairWins(NamedTuple):
    """The labeler's judgements of policies a and b."""

    a: str
    b: str
    wins: list[list[float]]  # of a, [prompts][samples], each from 0 to 1
    seed: int  # of the labeler's questions and of the bootstrap


def group_by_prompt(rows: list, samples: int) -> list[list]:
    """Return a flat list of rows as [prompts][samples]."""
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


def all_results(
    cfg: EvaluateSection, answers: Mapping[str, Answers], pairs: Sequence[PairWins], drops: Drops
) -> dict[str, Any]:
    """Return the content of results.json."""
    return {
        "labeler": cfg.labeler,
        "prompts": len(answers["sft"].texts) // cfg.samples_per_prompt,
        "samples_per_prompt": cfg.samples_per_prompt,
        "judgements": cfg.judgements,
        "temperature": cfg.temperature,
        "bootstrap": cfg.bootstrap,
        "drops": drops.table(),
        "policies": {name: policy_row(answer) for name, answer in answers.items()},
        "comparisons": [comparison_row(pair, answers, cfg) for pair in pairs],
    }


def policy_row(answer: Answers) -> dict[str, Any]:
    """Return one policy's row of results.json; lengths in tokens including EOS, KL in nats per response."""
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


def comparison_row(pair: PairWins, answers: Mapping[str, Answers], cfg: EvaluateSection) -> dict[str, Any]:
    """Return one pair's row of results.json: the win rate of a over b, and that among pairs of like length."""
    flat = [answers[name].rollout.lengths.tolist() for name in (pair.a, pair.b)]
    lengths = [group_by_prompt(row, cfg.samples_per_prompt) for row in flat]
    rate = win_rate(prompt_means(pair.wins), cfg.bootstrap, pair.seed)
    matched, n = length_matched_win_rate(pair.wins, *lengths, resamples=cfg.bootstrap, seed=pair.seed)
    fields = {"a": pair.a, "b": pair.b, **_win_rate_fields(rate, len(pair.wins))}
    return fields | {"length_matched": _win_rate_fields(matched, n) if matched else None}


def _win_rate_fields(rate: Interval, n: int) -> dict[str, float]:
    return {"win_rate": rate.mean, "low": rate.low, "high": rate.high, "n": n}


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that stage.json and wandb get: evaluate/<measure>/<policy>."""
    metrics = {}
    for name, row in results["policies"].items():
        for key in ("reward_score", "kl", "finished_fraction", "distinct_2", "pretraining_loss", "cloze_accuracy"):
            if row.get(key) is not None:
                metrics[f"evaluate/{key}/{name}"] = row[key]
        metrics[f"evaluate/response_length/{name}"] = row["response_length"]["mean"]
    for row in results["comparisons"]:
        if row["b"] == "sft":
            for key, suffix in (("win_rate", ""), ("low", "_low"), ("high", "_high")):
                metrics[f"evaluate/win_rate{suffix}/{row['a']}"] = row[key]
    return metrics


def sample_rows(asked: HeldOut, answers: Mapping[str, Answers], pairs: Sequence[PairWins]) -> list[dict[str, Any]]:
    """Return the rows of samples.jsonl: a prompt with every policy's response, length, score, KL and win over SFT."""
    over_sft = {pair.a: [win for row in pair.wins for win in row] for pair in pairs if pair.b == "sft"}
    samples = asked.samples_per_prompt
    return [
        {
            "prompt": prompt.text,
            "use_case": prompt.use_case,
            "sample": i % samples,
            "responses": {name: answer.texts[i] for name, answer in answers.items()},
            "finished": {name: bool(answer.rollout.finished[i]) for name, answer in answers.items()},
            "lengths": {name: int(answer.rollout.lengths[i]) for name, answer in answers.items()},
            "scores": {name: answer.scores[i] for name, answer in answers.items() if answer.scores},
            "kl": {name: answer.kl[i] if answer.kl else None for name, answer in answers.items()},
            "wins_over_sft": {name: wins[i] for name, wins in over_sft.items()},
        }
        for i, prompt in enumerate(asked.row_prompts)
    ]
