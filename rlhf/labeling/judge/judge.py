"""A language model that is asked by a template, and whose answers are read off label words.

Pairs are asked in both orders. The log-odds of the two answers, each turned toward the same output, are averaged: what
the order adds to both cancels, and is reported as position bias (rlhf/labeling/judge/labeler.py).

Answers are kept: no question is asked twice, and with a log also not after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rlhf.config import JudgeSection, Recipe
from rlhf.data.few_shot import check_judge, judge_template
from rlhf.data.prompt_template import Template, find_template, template_text
from rlhf.errors import UserError
from rlhf.functional.judge_odds import (
    BothOrders,
    calibrated,
    expected_points,
    log_odds,
    normalise_labels,
    sigmoid,
    win_log_odds,
)
from rlhf.labeling.judge.local import Fields, LabelReading, LocalReader, question_tokens
from rlhf.models.loading import load_tokenizer
from rlhf.models.peft.folder import find_adapter
from rlhf.models.pretrained import load_config
from rlhf.models.resolve import resolve_model
from rlhf.system.distributed import is_main_process
from rlhf.system.files import hash_path
from rlhf.system.row_log import append_rows, complete_rows

CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
LOG_CHUNK = 256  # questions to a local model before their answers go to the log
Triple = tuple[str, str, str]  # a prompt and two outputs


class Reader(Protocol):
    """Whoever answers the questions of a template: rlhf/labeling/judge/local.py, rlhf/labeling/judge/endpoint.py."""

    def question_fits(self, template: Template, fields: Fields) -> bool:
        """Whether the question is short enough."""
        ...

    def read(
        self,
        template: Template,
        questions: Sequence[Fields],
        advance: Callable[[int], None] | None = None,
        keep: Callable[[dict[int, LabelReading]], None] | None = None,
    ) -> list[LabelReading]:
        """The labels' log-probabilities for every question.

        Args:
            advance: called with the number of questions answered.
            keep: called with answers by the places of their questions as these come, of this process's share at least.
        """
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

    def both_order_questions(self, triples: Sequence[Triple]) -> list[Fields]:
        """The two questions about each pair: in both orders, or one about each output."""
        return [_fields(self.template, t) for prompt, a, b in triples for t in ((prompt, a, b), (prompt, b, a))]

    def readings(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> list[LabelReading]:
        """The answer to every question, asked where it is not known yet."""
        keys = [question_key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.answers}
        for keys_new in batched(new, LOG_CHUNK if self.log else len(new) or 1):
            asked, kept = [new[key] for key in keys_new], set[str]()

            def keep(come: dict[int, LabelReading], keys_new: list[str] = keys_new, kept: set[str] = kept) -> None:
                answers = {keys_new[place]: reading for place, reading in come.items()}
                kept.update(answers)
                self._keep(answers)

            found = dict(zip(keys_new, self.reader.read(self.template, asked, advance, keep), strict=True))
            self.asked += len(asked)
            self._keep({key: reading for key, reading in found.items() if key not in kept})
            self.answers |= found
        return [self.answers[key] for key in keys]

    def _keep(self, answers: dict[str, LabelReading]) -> None:
        """Remember answers, on disk too where there is a log."""
        self.answers |= answers
        if self.log and answers and is_main_process():
            rows = [{"judge": self.identity, "question": key, **found._asdict()} for key, found in answers.items()]
            append_rows(self.log, rows)

    def all_answered(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> bool:
        """Whether all of these have an answer; an endpoint refuses those that are too long for its model."""
        return not any(reading.refused for reading in self.readings(questions, advance))

    def labels(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """Log-probabilities of the labels for every question, calibrated where asked for; they sum to 1.

        Raises:
            UserError: for a question that the endpoint refuses as too long.
        """
        read = self.readings(questions, advance)
        if any(reading.refused for reading in read):
            raise UserError(
                "a question is too long for the endpoint's model",
                "judge.endpoint",
                "take a model with a longer context, a shorter template, or lower data.max_prompt_tokens",
            )
        if self.content_free:
            return [calibrated(reading.logprobs, self.content_free) for reading in read]
        return [normalise_labels(reading.logprobs) for reading in read]

    def both_orders(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[BothOrders]:
        """Each pair asked in both orders, by a template of pairs."""
        odds = [log_odds(labels) for labels in self.labels(self.both_order_questions(triples), advance)]
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
        points = self.labels(self.both_order_questions(triples), advance)
        return [win_log_odds(a, b) for a, b in zip(points[::2], points[1::2], strict=True)]

    def utility_gaps(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[float]:
        """By how much each triple's first output is above the second, from -1 to 1, as `JudgeLabeler` ranks the two.

        The difference of their probabilities to win, or of their expected points as a share of the scale.
        """
        if self.template.kind == "pair":
            return [2 * sigmoid(both.preference) - 1 for both in self.both_orders(triples, advance)]
        points = [expected_points(labels) for labels in self.labels(self.both_order_questions(triples), advance)]
        return [(a - b) / (len(self.template.labels) - 1) for a, b in zip(points[::2], points[1::2], strict=True)]

    def questions_for(self, prompt: str, texts: Sequence[str]) -> list[Fields]:
        """All questions that ranking these outputs comes to."""
        if self.template.kind == "pair":
            return self.both_order_questions([(prompt, a, b) for i, a in enumerate(texts) for b in texts[:i]])
        return [_fields(self.template, (prompt, text, "")) for text in texts]

    def questions_fit(self, prompt: str, texts: Sequence[str]) -> bool:
        """Whether all questions about these outputs are short enough."""
        return all(self.reader.question_fits(self.template, fields) for fields in self.questions_for(prompt, texts))


def label_mass_summary(readings: Sequence[LabelReading], labels: int) -> dict[str, Any]:
    """How sure answers are: mean probability of the labels together, and how many have labels known by a bound."""
    readings = [reading for reading in readings if not reading.refused]
    return {
        "answers": len(readings),
        "label_mass": fmean(reading.mass for reading in readings) if readings else None,
        "answers_with_bounds": sum(reading.bounded > 0 for reading in readings),
        "answers_without_label": sum(reading.bounded == labels for reading in readings),
    }


def question_key(question: Fields) -> str:
    """What a question is known by."""
    return json.dumps(question, sort_keys=True)


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
        from rlhf.labeling.judge.endpoint import EndpointReader

        endpoint = EndpointReader(
            cfg.endpoint, cfg.model, cfg.reasoning_tokens, cfg.top_logprobs, cfg.concurrency, cfg.timeout_s
        )
        return endpoint, f"{cfg.endpoint} {cfg.model} top {cfg.top_logprobs} {settings}"
    local = _local_reader(recipe)
    commit = getattr(local.model.config, "_commit_hash", None)  # of a Hub name, which may come to mean other weights
    chat = sha256(str(local.tokenizer.chat_template).encode()).hexdigest()[:16]  # prompt_format chooses it
    return local, f"{_content(judge_model(recipe))} {commit} {recipe.model.dtype} chat {chat} {settings}"


def judge_model(recipe: Recipe) -> str:
    """Name or folder of the local judge: its own, else the model that the recipe starts from."""
    return recipe.judge.model or recipe.model.name


def judge_files(cfg: JudgeSection) -> list[Path]:
    """Files and folders that the labels depend on."""
    named = (cfg.demonstrations, "" if cfg.endpoint else cfg.model)
    own = [Path(name).expanduser() for name in named if name]
    return [find_template(cfg.template, "judge"), *(path for path in own if path.exists())]


def check_context_fits(recipe: Recipe) -> None:
    """Hold the longest question that the recipe's limits allow to what the judge takes, before anything is sampled.

    Raises:
        UserError: when a prompt and responses of the longest kind would be over judge.max_tokens, or over the
            positions of a local judge's model.
    """
    cfg, data = recipe.judge, recipe.data
    if cfg.endpoint:
        return
    config = load_config(resolve_model(_plain(judge_model(recipe))), recipe.model)
    positions = getattr(config, "max_position_embeddings", 0)
    limit = min(filter(None, (cfg.max_tokens, positions)), default=0)
    if not limit:
        return
    template = judge_template(cfg)
    tokenizer = load_tokenizer(judge_model(recipe), recipe.model)
    empty = question_tokens(tokenizer, template, _fields(template, ("", "", "")), cfg.reasoning_tokens)
    outputs = 2 if template.kind == "pair" else 1
    longest = empty + data.max_prompt_tokens + outputs * data.max_response_tokens
    if longest > limit:
        fix = f"raise it to {longest}, or take a shorter template"
        if longest > (positions or longest):
            fix = f"take a shorter template, or another model: this one has positions for {positions}"
        raise UserError(
            f"questions to the judge may have {longest} tokens: {empty} of template {template.name}, "
            f"{data.max_prompt_tokens} of the prompt and {outputs} x {data.max_response_tokens} of responses",
            "judge.max_tokens",
            fix,
        )


def _plain(name: str) -> str:
    """The folder or name that holds the config: of an adapter, its base's."""
    adapter = find_adapter(name)
    return adapter.base.name if adapter else name


def _local_reader(recipe: Recipe) -> LocalReader:
    """The judge's own model, or the recipe's, in this process."""
    from rlhf.models.zero import load_frozen_policy
    from rlhf.system.distributed import pick_device

    cfg, where = recipe.judge, judge_model(recipe)
    tokenizer = load_tokenizer(where, recipe.model)
    policy = load_frozen_policy(recipe, pick_device(recipe), where, tokenizer)
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


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items, the last one shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _read_log(path: Path | None, identity: str) -> dict[str, LabelReading]:
    """Answers of this judge that the log holds."""
    rows = (
        complete_rows(path, ("judge", "question", *LabelReading._fields), "its question is asked again") if path else []
    )
    return {
        row["question"]: LabelReading(tuple(row["logprobs"]), row["reasoning"], row["bounded"])
        for row in rows
        if row["judge"] == identity
    }
