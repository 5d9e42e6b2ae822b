"""Measure how often a judge agrees with people on ranked data; all templates are measured on the same pairs.

The pairs are those that people ordered; ties are left out. A pair counts as right when the judge as labeler ranks the
output that people preferred above the other one, by its probability to win or by its expected points, and half when the
two are equal. `ties` is the share of pairs within judge.tie_margin, which the labeler would call ties. Calibration
compares probabilities with outcomes, in bins of equal size. With a template of points the probability is that one
output gets more points than the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from rlhf.config import JudgeSection
from rlhf.data.few_shot import judge_template
from rlhf.data.prompt_template import Template, load_template
from rlhf.data.records import Drops, Ranking
from rlhf.errors import UserError
from rlhf.functional.judge_odds import brier, calibration_error, log_loss
from rlhf.functional.ranking import calibration, ordered_pairs
from rlhf.functional.statistics import cluster_bootstrap, with_interval
from rlhf.labeling.judge.judge import Judge, Triple, label_mass_summary, question_key
from rlhf.labeling.judge.labeler import position_bias
from rlhf.labeling.judge.local import Fields


@dataclass
class GradedPrompt:
    """A prompt, its outputs, and the pairs of outputs that people ordered, the better one first."""

    prompt: str
    texts: list[str]
    pairs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def triples(self) -> list[Triple]:
        """Return the pairs as a judge is asked about them."""
        return [(self.prompt, better, worse) for better, worse in self.pairs]


def graded_prompts(rankings: Sequence[Ranking], drops: Drops) -> list[GradedPrompt]:
    """Return one item for each prompt, however many its rankings (intervals are over prompts), ordered by hash."""
    found: dict[str, GradedPrompt] = {}
    for ranking in sorted(rankings, key=lambda r: r.prompt.key):
        pairs = [(ranking.responses[i], ranking.responses[j]) for i, j in ordered_pairs(ranking.ranks)]
        if not pairs:
            drops.add("ranking without an ordered pair")
            continue
        item = found.setdefault(ranking.prompt.key, GradedPrompt(ranking.prompt.text, []))
        item.texts += ranking.responses
        item.pairs += pairs
    return list(found.values())


def drop_too_long_for_any(
    items: Sequence[GradedPrompt], judges: Sequence[Judge], limit: int, drops: Drops
) -> list[GradedPrompt]:
    """Return the first `limit` items (0: all) that every judge takes; count others. Raises UserError if none remain."""
    kept: list[GradedPrompt] = []
    for item in items:
        if limit and len(kept) == limit:
            break
        too_long = next((judge for judge in judges if not judge.questions_fit(item.prompt, item.texts)), None)
        if too_long is None:
            kept.append(item)
        else:
            drops.add(f"prompt with a question over judge.max_tokens by template {too_long.template.name}")
    if not kept:
        what = "no pair that people ordered is short enough for every template"
        raise UserError(what, "the files of rankings", "give others, or raise judge.max_tokens")
    return kept


def measure_judge(
    judge: Judge,
    items: Sequence[GradedPrompt],
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    tie_margin: float = 0.0,
) -> dict[str, Any]:
    """Return a judge's accuracy, calibration, position bias and speed on these pairs.

    Intervals are 95 % bootstraps over prompts with `seed`; `advance` is called with the number of questions answered.
    Raises UserError when an endpoint refuses a question of every prompt as too long.
    """
    begin, before = time.perf_counter(), judge.asked
    judge.readings(questions(judge, items), advance)
    seconds, asked = time.perf_counter() - begin, judge.asked - before
    answered = [item for item in items if judge.all_answered(judge.both_order_questions(item.triples))]
    if not answered:
        what, where = "the endpoint refuses a question of every prompt as too long", f"template {judge.template.name}"
        raise UserError(what, where, "take a shorter template, or a model with a longer context")
    return {
        "template": judge.template.name,
        "kind": judge.template.kind,
        "form": judge.template.form,
        "prompts": len(answered),
        "prompts_refused": len(items) - len(answered),
        **_quality(judge, answered, seed, tie_margin),
        "questions": asked,
        "seconds": seconds,
        "questions_per_s": asked / seconds if asked else None,
        **label_mass_summary(judge.readings(questions(judge, answered)), len(judge.template.labels)),
    }


def _quality(judge: Judge, items: Sequence[GradedPrompt], seed: int, tie_margin: float) -> dict[str, Any]:
    """Return accuracy, calibration and position bias from answers that the judge has already given."""
    triples = [triple for item in items for triple in item.triples]
    odds, utility_gaps = judge.preferences(triples), judge.utility_gaps(triples)
    right = _grouped([0.5 * (1 + float(np.sign(gap))) for gap in utility_gaps], items)
    reliability, pairwise = calibration(odds), judge.template.kind == "pair"
    return {
        "pairs": len(triples),
        **with_interval("accuracy", cluster_bootstrap(right, seed)),
        "ties": fmean(abs(gap) <= tie_margin for gap in utility_gaps),
        "log_loss": log_loss(odds),
        "brier": brier(odds),
        "calibration_error": calibration_error(reliability),
        "reliability": reliability,
        "position": position_bias(_grouped(judge.both_orders(triples), items), seed) if pairwise else None,
    }


def questions(judge: Judge, items: Sequence[GradedPrompt]) -> list[Fields]:
    """Return the questions that `measure_judge` asks, each once."""
    asked = judge.both_order_questions([triple for item in items for triple in item.triples])
    return list({question_key(question): question for question in asked}.values())


def templates_of(cfg: JudgeSection, names: Sequence[str]) -> list[Template]:
    """Load the templates of these names; a few-shot one gets the section's demonstrations where it names any.

    Raises UserError for a mistake in a template, or for two templates of one name.
    """
    found: list[Template] = []
    for name in names:
        few_shot = load_template(name).form == "few-shot"
        own = {"template": name, "demonstrations": cfg.demonstrations if few_shot else ""}
        found.append(judge_template(cfg.model_copy(update=own)))
        if [template.name for template in found].count(found[-1].name) > 1:
            raise UserError(f"two templates are called {found[-1].name}", name, "give one of them another `name:`")
    return found


def _grouped(values: Sequence[Any], items: Sequence[GradedPrompt]) -> list[list[Any]]:
    """Return the values of all pairs as one list for each prompt."""
    rest = iter(values)
    return [[next(rest) for _ in item.pairs] for item in items]
