"""A judge as labeler, and the bias of its answers toward a position.

K outputs are ranked by their mean probability to win over another one (K (K - 1) questions), or, by a template of
points, by their expected points (K questions).
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


class JudgeLabeler:
    """Ranks outputs as a judge answers; the seed changes nothing.

    Args:
        tie_margin: outputs whose utilities are no further than this from the best of their group tie with it. A
            utility is the mean probability to win, or expected points as a share of the scale: both from 0 to 1.
    """

    def __init__(self, judge: Judge, tie_margin: float = 0.0) -> None:
        self.judge, self.tie_margin = judge, tie_margin
        self.pairs: dict[str, dict[tuple[str, str], BothOrders]] = {}  # by prompt, for the position bias

    def utilities(self, prompt: Prompt, outputs: Sequence[Output]) -> list[float]:
        """Of each output, from 0 to 1; equal texts have equal ones."""
        texts, n = list(dict.fromkeys(output.text for output in outputs)), len(self.judge.template.labels)
        if len(texts) == 1:
            return [0.5] * len(outputs)
        if self.judge.template.kind == "points":
            points = self.judge.points([(prompt.text, text) for text in texts])
            by_text = {text: (expected_points(p) - 1) / (n - 1) for text, p in zip(texts, points, strict=True)}
            return [by_text[output.text] for output in outputs]
        places = [(i, j) for i in range(len(texts)) for j in range(i)]
        asked = self.judge.both_orders([(prompt.text, texts[i], texts[j]) for i, j in places])
        odds = [[0.0] * len(texts) for _ in texts]
        for (i, j), both in zip(places, asked, strict=True):
            odds[i][j], odds[j][i] = both.preference, -both.preference
            self.pairs.setdefault(prompt.key, {}).setdefault((texts[i], texts[j]), both)
        wins = dict(zip(texts, mean_wins(odds), strict=True))
        return [wins[output.text] for output in outputs]

    def answers(self, prompt: Prompt, outputs: Sequence[Output]) -> bool:
        """Ask all questions about these outputs; False when one of them is refused as too long."""
        texts = list(dict.fromkeys(output.text for output in outputs))
        return len(texts) == 1 or self.judge.all_answered(self.judge.questions_for(prompt.text, texts))

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int = 0) -> tuple[int, ...]:
        """Ranks by utility; see `Labeler.rank`."""
        return ranks_of(self.utilities(prompt, outputs), self.tie_margin)

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int = 0) -> float:
        """See `Labeler.prefers`."""
        return preference(self.rank(prompt, (a, b)))

    def outputs_fit(self, prompt: Prompt, outputs: Sequence[Output]) -> bool:
        """Whether all questions about these outputs are short enough."""
        return self.judge.questions_fit(prompt.text, [output.text for output in outputs])

    def summary(self) -> dict[str, Any]:
        """What is known of the labels: the template, how sure the answers are, position bias."""
        judge = self.judge
        sure = label_mass_summary(list(judge.answers.values()), len(judge.template.labels))
        found = {f"judge_{name}": value for name, value in sure.items()}
        groups = [list(pairs.values()) for pairs in self.pairs.values()]
        bias = position_bias(groups) if groups else {}
        return (
            {"judge_template": judge.template.name}
            | found
            | {f"position_{name}": value for name, value in bias.items()}
        )


def position_bias(groups: Sequence[Sequence[BothOrders]], seed: int = 0) -> dict[str, float | None]:
    """What the order changes, over the pairs of all prompts, with 95 % intervals.

    `flips` is the share of pairs that the two orders decide differently, `first` the share in which both name the one
    shown first (`second` likewise), `shift` the mean log-odds toward the first.

    Args:
        groups: one list for each prompt, the unit of the intervals.
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


def fitting(labeler: JudgeLabeler, items: Sequence[Any], drops: Drops) -> list[Any]:
    """Those items (with `prompt` and `outputs`) whose questions are short enough; the others are counted."""
    kept = [item for item in items if labeler.outputs_fit(item.prompt, item.outputs)]
    if len(kept) < len(items):
        drops.add("question to the judge over judge.max_tokens", len(items) - len(kept))
    return kept
