"""How often a judge agrees with people: templates measured on ranked data, all on the same pairs.

The pairs are those that people ordered; ties are left out. A pair counts as right when the judge as labeler ranks the
output that people preferred above the other one, by its probability to win or by its expected points, and half when
they are equal; `ties` are the pairs that are closer than judge.tie_margin, which it would label as ties.

Calibration is of probabilities: of a judge of points, that one output's points are above the other's. Confidence is
compared with accuracy in bins of equal size.
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
    """A prompt, its outputs, and the pairs of them that people ordered, the better one first."""

    prompt: str
    texts: list[str]
    pairs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def triples(self) -> list[Triple]:
        """As a judge is asked about them."""
        return [(self.prompt, better, worse) for better, worse in self.pairs]


def graded_prompts(rankings: Sequence[Ranking], drops: Drops) -> list[GradedPrompt]:
    """One for each prompt, in the order of the prompts' hashes, which says nothing about them or their file.

    Several rankings of one prompt become one: intervals are over prompts.
    """
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
    """The first `limit` items (0: all) whose questions are short enough for every judge; those left out are counted.

    Raises:
        UserError: when there is none.
    """
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
        raise UserError(
            "there is no pair that people ordered and that every template has room for",
            "the files of rankings",
            "give others, or raise judge.max_tokens",
        )
    return kept


def measure_judge(
    judge: Judge,
    items: Sequence[GradedPrompt],
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    tie_margin: float = 0.0,
) -> dict[str, Any]:
    """A judge's accuracy, calibration, position bias and speed on these pairs.

    Args:
        seed: of the bootstrap; 95 % intervals over prompts.
        advance: called with the number of questions answered.
        tie_margin: the labeler's, for the share of pairs that it would call ties.

    Raises:
        UserError: when an endpoint refuses a question of every prompt as too long.
    """
    begin, before = time.perf_counter(), judge.asked
    judge.readings(questions(judge, items), advance)
    seconds, asked = time.perf_counter() - begin, judge.asked - before
    whole = [item for item in items if judge.all_answered(judge.both_order_questions(item.triples))]
    refused, items = len(items) - len(whole), whole
    if not items:
        raise UserError(
            "the endpoint refuses a question of every prompt as too long",
            f"template {judge.template.name}",
            "take a shorter template, or a model with a longer context",
        )
    triples = [triple for item in items for triple in item.triples]
    odds, utility_gaps = judge.preferences(triples), judge.utility_gaps(triples)
    right = _grouped([0.5 * (1 + float(np.sign(gap))) for gap in utility_gaps], items)
    accuracy, reliability = cluster_bootstrap(right, seed), calibration(odds)
    found = {
        "template": judge.template.name,
        "kind": judge.template.kind,
        "form": judge.template.form,
        "prompts": len(items),
        "prompts_refused": refused,
        "pairs": len(triples),
        **with_interval("accuracy", accuracy),
        "ties": fmean(abs(gap) <= tie_margin for gap in utility_gaps),
        "log_loss": log_loss(odds),
        "brier": brier(odds),
        "calibration_error": calibration_error(reliability),
        "reliability": reliability,
        "position": None,
        "questions": asked,
        "seconds": seconds,
        "questions_per_s": asked / seconds if asked else None,
    }
    if judge.template.kind == "pair":
        found["position"] = position_bias(_grouped(judge.both_orders(triples), items), seed)
    readings = judge.readings(questions(judge, items))
    return found | label_mass_summary(readings, len(judge.template.labels))


def questions(judge: Judge, items: Sequence[GradedPrompt]) -> list[Fields]:
    """The questions that `measure` comes to, each once."""
    asked = judge.both_order_questions([triple for item in items for triple in item.triples])
    return list({question_key(question): question for question in asked}.values())


def templates_of(cfg: JudgeSection, names: Sequence[str]) -> list[Template]:
    """The templates of these names; a few-shot one with the section's demonstrations where it names any.

    Raises:
        UserError: for a mistake in one, or a name that comes twice.
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
    """Values of all pairs as one list for each prompt."""
    rest = iter(values)
    return [[next(rest) for _ in item.pairs] for item in items]
