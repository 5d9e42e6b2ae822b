"""A judge as labeler, and the bias of its answers toward a position.

A template of pairs ranks K outputs by their mean probability to win over another one, from K (K - 1) questions; a
template of points ranks them by their expected points, from K questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rlhf.data.records import Drops, Prompt
from rlhf.functional.judge_odds import BothOrders, expected_points, mean_wins
from rlhf.functional.statistics import cluster_bootstrap, with_interval
from rlhf.labeling.base import Output, preference, ranks_of
from rlhf.labeling.judge.judge import Judge, label_mass_summary
from rlhf.labeling.outputs import Outputs
from rlhf.system.console import warn


class JudgeLabeler:
    """Ranks by a judge's probabilities to win, or points as a share of the scale: 0 to 1. The seed has no effect."""

    def __init__(self, judge: Judge, tie_margin: float = 0.0) -> None:
        self.judge, self.tie_margin = judge, tie_margin
        self.pairs: dict[str, dict[tuple[str, str], BothOrders]] = {}  # by prompt, for the position bias

    def utilities(self, prompt: Prompt, outputs: Sequence[Output]) -> list[float]:
        """Return a utility from 0 to 1 for each output; equal texts have equal ones."""
        texts, n = list(dict.fromkeys(output.text for output in outputs)), len(self.judge.template.labels)
        if len(texts) == 1:
            return [0.5] * len(outputs)
        if self.judge.template.kind == "points":
            points = self.judge.points([(prompt.text, text) for text in texts])
            by_text = {text: (expected_points(p) - 1) / (n - 1) for text, p in zip(texts, points, strict=True)}
            return [by_text[output.text] for output in outputs]
        pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
        asked = self.judge.both_orders([(prompt.text, texts[i], texts[j]) for i, j in pairs])
        odds = [[0.0] * len(texts) for _ in texts]
        for (i, j), both in zip(pairs, asked, strict=True):
            odds[i][j], odds[j][i] = both.preference, -both.preference
            self.pairs.setdefault(prompt.key, {}).setdefault((texts[i], texts[j]), both)
        wins = dict(zip(texts, mean_wins(odds), strict=True))
        return [wins[output.text] for output in outputs]

    def all_answered(self, prompt: Prompt, outputs: Sequence[Output]) -> bool:
        """Ask all questions about these outputs; return whether none is refused as too long."""
        texts = list(dict.fromkeys(output.text for output in outputs))
        return len(texts) == 1 or self.judge.all_answered(self.judge.questions_for(prompt.text, texts))

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int = 0) -> tuple[int, ...]:
        """Return the ranks of the outputs by utility; see `Labeler`."""
        return ranks_of(self.utilities(prompt, outputs), self.tie_margin)

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int = 0) -> float:
        """Return 1, 0 or 0.5 by the ranks of the two outputs; see `Labeler`."""
        return preference(self.rank(prompt, (a, b)))

    def drop_too_long(self, outputs: Sequence[Outputs], drops: Drops) -> list[Outputs]:
        """Return the outputs about which all questions are short enough; `drops` counts the prompts of the others."""
        kept = [each for each in outputs if self.judge.questions_fit(each.prompt.text, each.responses)]
        if len(kept) < len(outputs):
            drops.add("question to the judge over judge.max_tokens", len(outputs) - len(kept))
        return kept

    def summary(self) -> dict[str, Any]:
        """Return the template, how sure the answers are, and the position bias; warn of answers without any label."""
        judge = self.judge
        sure = label_mass_summary(list(judge.answers.values()), len(judge.template.labels))
        if without := sure["answers_without_label"]:
            which = f"{without} of the judge's {sure['answers']} answers"
            warn(f"{which} had no label among the likeliest tokens: there it decided nothing")
        groups = [list(pairs.values()) for pairs in self.pairs.values()]
        bias = position_bias(groups) if groups else {}
        found = {"judge_template": judge.template.name} | {f"judge_{name}": value for name, value in sure.items()}
        return found | {f"position_{name}": value for name, value in bias.items()}


def position_bias(groups: Sequence[Sequence[BothOrders]], seed: int = 0) -> dict[str, float | None]:
    """Return by how much the order decides, over the pairs of each prompt, with 95 % intervals over prompts.

    `flips` is the share of pairs that the two orders decide differently. `first` is the share in which both orders name
    the output shown first, and `second` likewise. `shift` is the mean log-odds toward the first.
    """
    flips = cluster_bootstrap([[float(pair.flips) for pair in group] for group in groups], seed)
    shift = cluster_bootstrap([[pair.shift for pair in group] for group in groups], seed, shares=False)
    pairs = [pair for group in groups for pair in group]
    return {
        "pairs": len(pairs),
        **with_interval("flips", flips),
        "first": fmean(pair.ab > 0 and pair.ba > 0 for pair in pairs),
        "second": fmean(pair.ab < 0 and pair.ba < 0 for pair in pairs),
        **with_interval("shift", shift),
    }
