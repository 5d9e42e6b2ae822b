"""Load the judge's template that a recipe names, and make worked examples for it from ranked outputs."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from rlhf.config import JudgeSection
from rlhf.data.prompt_template import Example, Template, load_template, with_examples
from rlhf.data.records import Drops, Ranking, read_rankings
from rlhf.data.sources import local_path
from rlhf.errors import UserError


def judge_template(cfg: JudgeSection) -> Template:
    """Return a recipe's template with its file's demonstrations, if any; raise UserError if they are wrong."""
    template = load_template(cfg.template)
    if cfg.demonstrations:
        if template.form != "few-shot":
            what = f"{template.name} is a {template.form} template and takes no demonstrations from a file"
            raise UserError(what, "judge.demonstrations", "take a few-shot template, or leave the field empty")
        found = examples_from(example_rankings(read_rankings([cfg.demonstrations], Drops()))[: cfg.shots], template)
        template = with_examples(template, found)
    if template.form != "zero-shot" and not template.reasons and not template.examples:
        fix = "give it some after a line `--- demonstrations`, or name a file of rankings in judge.demonstrations"
        raise UserError(f"{template.name} is a few-shot template without demonstrations", "judge.template", fix)
    if cfg.calibrate and (why := why_not_calibrated(template)):
        fix = "set it to false, or take another template"
        raise UserError(f"judge.calibrate is on, and {why}", "judge.calibrate", fix)
    return template


def why_not_calibrated(template: Template) -> str:
    """Return why contextual calibration has no effect with a template; "" if it has one."""
    if template.reasons:
        return f"{template.name} reasons: there is nothing to reason about without content"
    if template.kind == "pair":
        # Calibration subtracts one constant from the log-odds of both orders, which cancels in their difference.
        return f"{template.name} is asked in both orders, in which the correction cancels"
    return ""


def check_judge(cfg: JudgeSection) -> None:
    """Check endpoint, template and demonstrations before any model is loaded; raise UserError if one is wrong."""
    if cfg.endpoint:
        parts = urlsplit(cfg.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("this is not the URL of an endpoint", "judge.endpoint", "give it as http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query:
            what = "an endpoint's URL must not have a name, password or query: recipes are copied into runs and shown"
            raise UserError(what, "judge.endpoint", "put the key into the environment: export OPENAI_API_KEY=...")
        if not cfg.model:
            raise UserError("an endpoint is asked for a model by name", "judge.model", "give the name it knows it by")
    if cfg.demonstrations:
        local_path(cfg.demonstrations)
    judge_template(cfg)


def example_rankings(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Return the rankings that an example can be made of: those whose outputs do not all tie."""
    return [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]


def examples_from(rankings: Sequence[Ranking], template: Template) -> list[Example]:
    """Make one example of each ranking, in order.

    An example of a pair shows the best and the worst output. Their order follows the Thue-Morse sequence (A B B A B A A
    B ..): both labels occur equally often, and no simple pattern predicts the next one. An example of points is one
    output, in turn the best, the worst and the middle one. The distinct ranks are spread evenly over the labels, the
    best rank at the highest label.
    """
    make = _pair if template.kind == "pair" else _points
    return [make(ranking, template.labels, i) for i, ranking in enumerate(rankings)]


def _pair(ranking: Ranking, labels: Sequence[str], i: int) -> Example:
    best, worst = (ranking.responses[ranking.ranks.index(rank)] for rank in (min(ranking.ranks), max(ranking.ranks)))
    best_at = bin(i).count("1") % 2  # the Thue-Morse sequence
    first, second = (best, worst) if best_at == 0 else (worst, best)
    return Example({"prompt": ranking.prompt.text, "first": first, "second": second}, labels[best_at])


def _points(ranking: Ranking, labels: Sequence[str], i: int) -> Example:
    ranks = sorted(set(ranking.ranks))
    position = (0, len(ranks) - 1, len(ranks) // 2)[i % 3]
    response = ranking.responses[ranking.ranks.index(ranks[position])]
    below = round(position * (len(labels) - 1) / (len(ranks) - 1))
    return Example({"prompt": ranking.prompt.text, "response": response}, labels[len(labels) - 1 - below])
