"""A language model as labeler: it is asked by a template, and its answer is read off label words.

Pairs are asked in both orders. The log-odds of the two answers, each turned toward the same output, are averaged: what
the order adds to both cancels, and is reported as position bias. K outputs are ranked by their mean probability to win
over another one (K (K - 1) questions), or, by a template of points, by their expected points (K questions).

Answers are kept: no question is asked twice, and with a log also not after an interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rlhf.config import JudgeSection, Recipe
from rlhf.errors import UserError
from rlhf.evaluation import Interval, wilson_interval
from rlhf.judge_examples import check_judge, judge_template
from rlhf.judge_template import Template, template_text
from rlhf.judging import BothOrders, calibrated, expected_points, log_odds, mean_wins, normalised, win_log_odds
from rlhf.labelers import Output, preference, ranks_of
from rlhf.models import load_policy, load_tokenizer
from rlhf.progress import console, is_main_process
from rlhf.ranking import PairCounts, accuracy_interval
from rlhf.records import Drops, Prompt, write_jsonl
from rlhf.rundir import hash_path
from rlhf.verbalizer import Fields, LocalReader, Reading, question_tokens

CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
Triple = tuple[str, str, str]  # a prompt and two outputs


class Reader(Protocol):
    """Whoever answers the questions of a template: rlhf/verbalizer.py, rlhf/judge_endpoint.py."""

    def fits(self, template: Template, fields: Fields) -> bool:
        """Whether the question is short enough."""
        ...

    def read(
        self, template: Template, questions: Sequence[Fields], advance: Callable[[int], None] | None = None
    ) -> list[Reading]:
        """The labels' log-probabilities for every question."""
        ...


class Judge:
    """A template, who answers it, and all that was answered.

    Args:
        log: file of answers, one a line, that is read first and appended to; None keeps them in memory alone.
        identity: of the model, for the log: answers of another model, template or setting are not taken over.
        calibrate: contextual calibration, from three questions without content.
    """

    def __init__(
        self,
        template: Template,
        reader: Reader,
        log: Path | None = None,
        identity: str = "",
        calibrate: bool = False,
    ) -> None:
        self.template, self.reader, self.log = template, reader, log
        self.identity = sha256(f"{identity}\n{template_text(template)}".encode()).hexdigest()
        self.answers = _read_log(log, self.identity)
        self.asked = 0
        self.content_free: list[Sequence[float]] = []
        if calibrate:
            blank = [dict.fromkeys(_fields(template, ("", "", "")), text) for text in CONTENT_FREE]
            self.content_free = [reading.logprobs for reading in self.readings(blank)]

    def readings(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> list[Reading]:
        """The answer to every question, asked where it is not known yet."""
        keys = [json.dumps(question, sort_keys=True) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.answers}
        if new:
            found = dict(zip(new, self.reader.read(self.template, list(new.values()), advance), strict=True))
            self.asked += len(new)
            self.answers |= found
            if self.log and is_main_process():
                _append(self.log, self.identity, found)
        return [self.answers[key] for key in keys]

    def labels(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """Log-probabilities of the labels for every question, calibrated where asked for; they sum to 1."""
        read = self.readings(questions, advance)
        if self.content_free:
            return [calibrated(reading.logprobs, self.content_free) for reading in read]
        return [normalised(reading.logprobs) for reading in read]

    def both_orders(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[BothOrders]:
        """Each pair asked in both orders, by a template of pairs."""
        turned = [(prompt, b, a) for prompt, a, b in triples]
        asked = [_fields(self.template, triple) for both in zip(triples, turned, strict=True) for triple in both]
        odds = [log_odds(labels) for labels in self.labels(asked, advance)]
        return [BothOrders(*two) for two in zip(odds[::2], odds[1::2], strict=True)]

    def points(
        self, answers: Sequence[tuple[str, str]], advance: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Log-probabilities of the points of each (prompt, output), by a template of points."""
        return self.labels([_fields(self.template, (prompt, text, "")) for prompt, text in answers], advance)

    def preferences(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[float]:
        """Log-odds that the first output of each triple is better than the second."""
        if self.template.kind == "pair":
            return [both.preference for both in self.both_orders(triples, advance)]
        sides = [(prompt, text) for prompt, *texts in triples for text in texts]
        points = self.points(sides, advance)
        return [win_log_odds(a, b) for a, b in zip(points[::2], points[1::2], strict=True)]

    def fits(self, prompt: str, texts: Sequence[str]) -> bool:
        """Whether all questions about these outputs are short enough."""
        if self.template.kind == "pair":
            triples = [(prompt, a, b) for i, a in enumerate(texts) for b in texts[:i]]
        else:
            triples = [(prompt, text, "") for text in texts]
        return all(self.reader.fits(self.template, _fields(self.template, triple)) for triple in triples)

    def doubts(self) -> dict[str, Any]:
        """How sure the answers are: mean probability of the labels together, and labels known by a bound alone."""
        found = self.answers.values()
        return {
            "answers": len(found),
            "label_mass": fmean(reading.mass for reading in found) if found else None,
            "answers_with_bounds": sum(reading.bounded > 0 for reading in found),
            "answers_without_label": sum(reading.bounded == len(self.template.labels) for reading in found),
        }


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

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int = 0) -> tuple[int, ...]:
        """Ranks by utility; see `Labeler.rank`."""
        return ranks_of(self.utilities(prompt, outputs), self.tie_margin)

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int = 0) -> float:
        """See `Labeler.prefers`."""
        return preference(self.rank(prompt, (a, b)))

    def fits(self, prompt: Prompt, outputs: Sequence[Output]) -> bool:
        """Whether all questions about these outputs are short enough."""
        return self.judge.fits(prompt.text, [output.text for output in outputs])

    def summary(self) -> dict[str, Any]:
        """What is known of the labels: the template, how sure the answers are, position bias."""
        found = {"template": self.judge.template.name} | self.judge.doubts()
        groups = [list(pairs.values()) for pairs in self.pairs.values()]
        bias = position_bias(groups) if groups else {}
        return found | {f"position_{name}": value for name, value in bias.items()}


def position_bias(groups: Sequence[Sequence[BothOrders]], seed: int = 0) -> dict[str, float]:
    """What the order changes, over the pairs of all prompts, with 95 % intervals.

    `flips` is the share of pairs that the two orders decide differently, `first` the share in which both name the one
    shown first (`second` likewise), `shift` the mean log-odds toward the first.

    Args:
        groups: one list for each prompt, the unit of the intervals.
    """
    flips = clustered([[float(pair.flips) for pair in group] for group in groups], seed)
    shift = clustered([[pair.shift for pair in group] for group in groups], seed)
    pairs = [pair for group in groups for pair in group]
    return {
        "pairs": len(pairs),
        "flips": flips.mean,
        "flips_low": flips.low,
        "flips_high": flips.high,
        "first": fmean(pair.ab > 0 and pair.ba > 0 for pair in pairs),
        "second": fmean(pair.ab < 0 and pair.ba < 0 for pair in pairs),
        "shift": shift.mean,
        "shift_low": shift.low,
        "shift_high": shift.high,
    }


def clustered(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Mean over all values and its 95 % bootstrap interval over groups (pairs of one prompt are not independent).

    Shares that are all 0 or all 1 show no spread however few they are: then it is the Wilson interval.
    """
    values = [value for group in groups for value in group]
    if set(values) in ({0.0}, {1.0}):
        return wilson_interval(sum(values), len(values))
    return Interval(*accuracy_interval([PairCounts(sum(group), len(group), []) for group in groups], seed))


def load_judge(recipe: Recipe, log: Path | None = None) -> Judge:
    """The judge of a recipe's section `judge`, its model loaded or its endpoint known.

    Raises:
        UserError: for a mistake in the section, or a model that cannot be loaded.
    """
    check_judge(recipe.judge)
    reader, identity = make_reader(recipe)
    return Judge(judge_template(recipe.judge), reader, log, identity, recipe.judge.calibrate)


def make_reader(recipe: Recipe) -> tuple[Reader, str]:
    """Who answers, and what tells its answers from those of others."""
    cfg = recipe.judge
    settings = f"reasoning {cfg.reasoning_tokens}"
    if cfg.endpoint:
        from rlhf.judge_endpoint import EndpointReader

        endpoint = EndpointReader(
            cfg.endpoint, cfg.model, cfg.reasoning_tokens, cfg.top_logprobs, cfg.concurrency, cfg.timeout_s
        )
        return endpoint, f"{cfg.endpoint} {cfg.model} top {cfg.top_logprobs} {settings}"
    return _local_reader(recipe), f"{_content(judge_model(recipe))} {recipe.model.dtype} {settings}"


def judge_model(recipe: Recipe) -> str:
    """Name or folder of the local judge: its own, else the model that the recipe starts from."""
    return recipe.judge.model or recipe.model.name


def judge_files(cfg: JudgeSection) -> list[Path]:
    """Files of the user's own that the labels depend on."""
    named = (cfg.template, cfg.demonstrations, "" if cfg.endpoint else cfg.model)
    return [path for path in (Path(name).expanduser() for name in named if name) if path.exists()]


def fitting(labeler: JudgeLabeler, items: Sequence[Any], drops: Drops) -> list[Any]:
    """Those items (with `prompt` and `outputs`) whose questions are short enough; the others are counted."""
    kept = [item for item in items if labeler.fits(item.prompt, item.outputs)]
    if len(kept) < len(items):
        drops.add("question to the judge over judge.max_tokens", len(items) - len(kept))
    return kept


def check_room(recipe: Recipe) -> None:
    """Hold the longest question that the recipe's limits allow to judge.max_tokens, before anything is sampled.

    Raises:
        UserError: when a prompt and responses of the longest kind would be over it.
    """
    cfg, data = recipe.judge, recipe.data
    if cfg.endpoint or not cfg.max_tokens:
        return
    template = judge_template(cfg)
    tokenizer = load_tokenizer(judge_model(recipe), recipe.model.prompt_format, recipe.model.trust_remote_code)
    empty = question_tokens(tokenizer, template, _fields(template, ("", "", "")), cfg.reasoning_tokens)
    outputs = 2 if template.kind == "pair" else 1
    longest = empty + data.max_prompt_tokens + outputs * data.max_response_tokens
    if longest > cfg.max_tokens:
        raise UserError(
            f"questions to the judge may have {longest} tokens: {empty} of template {template.name}, "
            f"{data.max_prompt_tokens} of the prompt and {outputs} x {data.max_response_tokens} of responses",
            "judge.max_tokens",
            f"raise it to {longest}, or take a shorter template",
        )


def _local_reader(recipe: Recipe) -> LocalReader:
    from rlhf.stage import pick_device
    from rlhf.zero import frozen

    cfg, model, where = recipe.judge, recipe.model, judge_model(recipe)
    tokenizer = load_tokenizer(where, model.prompt_format, model.trust_remote_code)
    policy = frozen(recipe, pick_device(recipe), lambda: load_policy(where, model, tokenizer=tokenizer, merged=True))
    return LocalReader(policy, tokenizer, cfg.batch_tokens, cfg.reasoning_tokens, cfg.max_tokens)


def _content(name: str) -> str:
    """A folder's hash: another model may come to lie there; the name of anything else."""
    path = Path(name).expanduser()
    return hash_path(path) if path.is_dir() else name


def _fields(template: Template, triple: Triple) -> dict[str, str]:
    prompt, a, b = triple
    if template.kind == "pair":
        return {"prompt": prompt, "first": a, "second": b}
    return {"prompt": prompt, "response": a}


def _read_log(path: Path | None, identity: str) -> dict[str, Reading]:
    """Answers of this judge that the log holds; the file is left with whole lines alone."""
    found: dict[str, Reading] = {}
    if path is None or not path.exists():
        return found
    rows = []
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            row = json.loads(line)
        except ValueError:
            console.print(f"{path.name}: a line was cut off by an interruption; its question is asked again")
            continue
        rows.append(row)
        if row["judge"] == identity:
            found[row["question"]] = Reading(tuple(row["logprobs"]), row["reasoning"], row["bounded"])
    if is_main_process():
        write_jsonl(path, rows)
    return found


def _append(path: Path, identity: str, answers: dict[str, Reading]) -> None:
    """Add answers to the log and wait until they are on disk."""
    rows = [{"judge": identity, "question": key, **reading._asdict()} for key, reading in answers.items()]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
