"""Search the best of many templates for a judge: their texts as they are, and with drawn demonstrations.

The prompts of ranked data are split into three parts by their hash. Demonstrations are drawn from the first. Every
candidate is scored on the second, and the best one again on the third, since the best of many looks better than it is
on the data that chose it. Where that score is outside the interval of the first, there is a warning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.few_shot import example_rankings, examples_from
from rlhf.data.prompt_template import Template, with_examples
from rlhf.data.records import Drops, Ranking
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed
from rlhf.labeling.judge.accuracy import GradedPrompt, drop_too_long_for_any, graded_prompts, measure_judge
from rlhf.labeling.judge.judge import Judge

CONFIRM = 1 / 3  # share of all prompts
POOL = 1 / 4  # share of the other prompts
EXAMPLE_WORDS = 120  # maximum length of a demonstration, so that the question still fits


class SearchSplits(NamedTuple):
    """The rankings of each part; no prompt is in two parts."""

    pool: list[Ranking]
    score: list[Ranking]
    confirm: list[Ranking]


def split_rankings(rankings: Sequence[Ranking], seed: int) -> SearchSplits:
    """Split the rankings into the three parts, by hash of the prompt and seed."""
    rest, confirm = split_by_prompt(rankings, CONFIRM, seed)
    score, pool = split_by_prompt(rest, POOL, seed + 1)
    return SearchSplits(pool, score, confirm)


def candidate_templates(
    templates: Sequence[Template], pool: Sequence[Ranking], shots: Sequence[int], trials: int, seed: int
) -> list[Template]:
    """Return every template as it is, and with `trials` draws of each number of demonstrations in `shots`.

    Templates that reason get none. Raises UserError when the pool has too few rankings that can serve.
    """
    short = [ranking for ranking in example_rankings(pool) if _words(ranking) <= EXAMPLE_WORDS]
    if shots and len(short) < max(shots):
        without = f"without those where all outputs tie or with more than {EXAMPLE_WORDS} words"
        has = f"the pool has {len(short)} (of {len(pool)} rankings: {without})"
        what = f"{max(shots)} demonstrations are to be drawn, and {has}"
        raise UserError(what, "--shots", "draw fewer, or give more rankings")
    found = []
    for template in templates:
        found.append(template)
        if template.reasons:  # a ranking gives no reasons
            continue
        for n in shots:
            for trial in range(trials):
                drawn = random.Random(row_seed(seed, "demonstrations", template.name, n, trial)).sample(short, n)
                name = f"{template.name}-{n}-shots-{trial + 1}"
                found.append(with_examples(template, examples_from(drawn, template), name))
    return found


class SearchResult(NamedTuple):
    """The chosen template, the measurements, and a warning."""

    template: Template
    report: dict[str, Any]
    warning: str  # empty when the two scores agree


def search(
    judges: Sequence[Judge],
    parts: SearchSplits,
    drops: Drops,
    limit: int = 0,
    seed: int = 0,
    measure: Callable[[Judge, Sequence[GradedPrompt], str], dict[str, Any]] | None = None,
) -> SearchResult:
    """Score every judge (one for each candidate), choose the most accurate, and score it again on other prompts.

    Among equally accurate ones the lower log loss decides, then the order given. `limit` prompts are scored in each
    part, 0: all. `measure` replaces `measure_judge`, to show progress: (judge, items, "score" or "confirm").
    """
    measure = measure or (lambda judge, items, part: measure_judge(judge, items, seed))
    scored, confirming = (
        drop_too_long_for_any(graded_prompts(part, drops), judges, limit, drops) for part in parts[1:]
    )
    scores = [measure(judge, scored, "score") for judge in judges]
    best = max(range(len(judges)), key=lambda i: (scores[i]["accuracy"], -scores[i]["log_loss"], -i))
    again = measure(judges[best], confirming, "confirm")
    first = again if best == 0 else measure(judges[0], confirming, "confirm")
    report = {
        "chosen": judges[best].template.name,
        "score": scores[best],
        "confirmation": again,
        "first_candidate_confirmation": first,
        "candidates": scores,
        "prompts": {name: len(part) for name, part in zip(SearchSplits._fields, parts, strict=True)},
        "drops": dict(drops.table()),
    }
    return SearchResult(judges[best].template, report, _disagreement(scores[best], again))


def template_comments(report: dict[str, Any], files: Sequence[str]) -> list[str]:
    """Return comments for the head of the chosen template's file: its source and its accuracy."""

    def line(what: str, row: dict[str, Any]) -> str:
        low, high = row["accuracy_low"], row["accuracy_high"]
        ends = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{what}: {100 * row['accuracy']:.1f} %{ends} of {row['pairs']} pairs of {row['prompts']} prompts"

    return [
        f"Chosen by rlhf judge-search out of {len(report['candidates'])} candidates on"
        f" {', '.join(Path(file).name for file in files)}.",
        line("accuracy where it was chosen", report["score"]),
        line("accuracy on other prompts", report["confirmation"]),
    ]


def _disagreement(score: dict[str, Any], again: dict[str, Any]) -> str:
    if score["accuracy_low"] is None or score["accuracy_low"] <= again["accuracy"] <= score["accuracy_high"]:
        return ""
    lower = again["accuracy"] < score["accuracy_low"]
    why = "the choice fits the prompts it was made on" if lower else "the prompts of the two parts differ"
    return (
        f"on other prompts the chosen template is right in {100 * again['accuracy']:.1f} % of pairs, outside the "
        f"interval [{100 * score['accuracy_low']:.1f}, {100 * score['accuracy_high']:.1f}] it was chosen with: {why}"
    )


def _words(ranking: Ranking) -> int:
    """Return the number of words of the prompt and its two longest responses."""
    longest = sorted(len(text.split()) for text in ranking.responses)[-2:]
    return len(ranking.prompt.text.split()) + sum(longest)
