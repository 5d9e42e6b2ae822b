"""The judge's template as a recipe names it, and worked examples made of ranked outputs.

A pair's example shows the best and the worst output of a ranking. Which of them stands first follows the Thue-Morse
sequence (A B B A B A A B ..): both labels come equally often and no simple pattern foretells the next one. An example
of points is one output, by turns the best, the worst and the middle one; the places of its ranking are spread evenly
over the labels, the best one getting the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from rlhf.config import JudgeSection
from rlhf.data.prompt_template import Example, Template, load_template, with_examples
from rlhf.data.records import Drops, Ranking, read_rankings
from rlhf.data.sources import local_path
from rlhf.errors import UserError


def judge_template(cfg: JudgeSection) -> Template:
    """The template of a recipe, with the recipe's own demonstrations where it names any.

    Raises:
        UserError: no such template or a mistake in it, or demonstrations that it cannot take or has not got.
    """
    template = load_template(cfg.template)
    if cfg.demonstrations:
        if template.form != "few-shot":
            raise UserError(
                f"{template.name} is a {template.form} template and takes no demonstrations from a file",
                "judge.demonstrations",
                "take a few-shot template, or leave the field empty",
            )
        found = examples_from(example_rankings(read_rankings([cfg.demonstrations], Drops()))[: cfg.shots], template)
        template = with_examples(template, found)
    if template.form != "zero-shot" and not template.reasons and not template.examples:
        raise UserError(
            f"{template.name} is a few-shot template without demonstrations",
            "judge.template",
            "give it some after a line `--- demonstrations`, or name a file of rankings in judge.demonstrations",
        )
    if cfg.calibrate and (why := why_not_calibrated(template)):
        raise UserError(
            f"judge.calibrate is on, and {why}", "judge.calibrate", "set it to false, or take another template"
        )
    return template


def why_not_calibrated(template: Template) -> str:
    """Why contextual calibration does nothing for answers to a template; empty where it does."""
    if template.reasons:
        return f"{template.name} reasons: there is nothing to reason about without content"
    if template.kind == "pair":
        # One constant is taken off the log-odds of both orders, and cancels in their mean.
        return f"{template.name} is asked in both orders, in which what calibration takes off cancels"
    return ""


def check_judge(cfg: JudgeSection) -> None:
    """What can be known before anything is loaded.

    Raises:
        UserError: for a bad endpoint, template or file of demonstrations.
    """
    if cfg.endpoint:
        parts = urlsplit(cfg.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("this is no URL of an endpoint", "judge.endpoint", "give it as http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "an endpoint's URL has no name, password or query: a recipe is written into the run and shown",
                "judge.endpoint",
                "put the key into the environment: export OPENAI_API_KEY=...",
            )
        if not cfg.model:
            raise UserError("an endpoint is asked for a model by name", "judge.model", "give the name it knows it by")
    if cfg.demonstrations:
        local_path(cfg.demonstrations)
    judge_template(cfg)


def example_rankings(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Rankings that an example can be made of: not all of their outputs tie."""
    return [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]


def examples_from(rankings: Sequence[Ranking], template: Template) -> list[Example]:
    """One example of each ranking, in order; see the head of this file."""
    make = _pair if template.kind == "pair" else _points
    return [make(ranking, template.labels, i) for i, ranking in enumerate(rankings)]


def _pair(ranking: Ranking, labels: Sequence[str], i: int) -> Example:
    best, worst = (ranking.responses[ranking.ranks.index(rank)] for rank in (min(ranking.ranks), max(ranking.ranks)))
    right = bin(i).count("1") % 2
    first, second = (best, worst) if right == 0 else (worst, best)
    return Example({"prompt": ranking.prompt.text, "first": first, "second": second}, labels[right])


def _points(ranking: Ranking, labels: Sequence[str], i: int) -> Example:
    places = sorted(set(ranking.ranks))
    place = (0, len(places) - 1, len(places) // 2)[i % 3]
    response = ranking.responses[ranking.ranks.index(places[place])]
    below = round(place * (len(labels) - 1) / (len(places) - 1))
    return Example({"prompt": ranking.prompt.text, "response": response}, labels[len(labels) - 1 - below])
