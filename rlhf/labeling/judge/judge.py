"""Ask a language model which output is better, by a template, and read its answer off label words.

A pair is asked about in both orders. The log-odds of the two answers, both taken for the same output, are averaged:
what the order adds to them cancels, and is reported as position bias (rlhf/labeling/judge/labeler.py). Answers are
kept, so that no question is asked twice; with a log that holds after an interruption too.
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
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_tokenizer
from rlhf.models.peft.folder import find_adapter
from rlhf.models.pretrained import load_config
from rlhf.models.resolve import resolve_model
from rlhf.system.console import warn
from rlhf.system.distributed import pick_device
from rlhf.system.files import hash_path
from rlhf.system.ranks import is_main_process
from rlhf.system.row_log import append_rows, complete_rows

CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
LOG_CHUNK = 256  # questions to a local model after which their answers are written to the log
Triple = tuple[str, str, str]  # a prompt and two outputs


class Reader(Protocol):
    """Answers the questions of a template: `LocalReader` by a model of this process, `EndpointReader` over HTTP."""

    def question_fits(self, template: Template, fields: Fields) -> bool:
        """Return whether the question is short enough."""
        ...

    def read(
        self,
        template: Template,
        questions: Sequence[Fields],
        advance: Callable[[int], None] | None = None,
        keep: Callable[[dict[int, LabelReading]], None] | None = None,
    ) -> list[LabelReading]:
        """Return the labels' log-probabilities for every question.

        `advance` is called with the number of questions answered; `keep` with new answers as they come, by the index of
        their question. In a distributed run `keep` may get the answers of this process alone.
        """
        ...


class Judge:
    """A template, the reader that answers its questions, and all answers so far.

    `log` has an answer a line, is read and then appended to; None: memory alone. Answers in it under another `identity`
    (the model and its settings) or template are ignored. `calibrate`: by three questions without content (Zhao et al.
    2021).
    """

    def __init__(
        self, template: Template, reader: Reader, log: Path | None = None, identity: str = "", calibrate: bool = False
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
        """Return two questions about each pair: the pair in both orders, or each output by a template of points."""
        return [_fields(self.template, t) for prompt, a, b in triples for t in ((prompt, a, b), (prompt, b, a))]

    def readings(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> list[LabelReading]:
        """Return the answer to every question; questions without a kept answer are asked."""
        keys = [question_key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.answers}
        for keys_new in batched(new, LOG_CHUNK if self.log else len(new) or 1):
            asked, kept = [new[key] for key in keys_new], set[str]()

            def keep(by_index: dict[int, LabelReading], keys: list[str] = keys_new, kept: set[str] = kept) -> None:
                answers = {keys[i]: reading for i, reading in by_index.items()}
                kept.update(answers)
                self._keep(answers)

            found = dict(zip(keys_new, self.reader.read(self.template, asked, advance, keep), strict=True))
            self.asked += len(asked)
            self._keep({key: reading for key, reading in found.items() if key not in kept})
            self.answers |= found
        return [self.answers[key] for key in keys]

    def _keep(self, answers: dict[str, LabelReading]) -> None:
        """Keep answers in memory and, where there is a log, on disk."""
        self.answers |= answers
        if self.log and answers and is_main_process():
            rows = [{"judge": self.identity, "question": key, **found._asdict()} for key, found in answers.items()]
            append_rows(self.log, rows)

    def all_answered(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> bool:
        """Return whether all of these get an answer: an endpoint refuses those that are too long for its model."""
        return not any(reading.refused for reading in self.readings(questions, advance))

    def labels(self, questions: Sequence[Fields], advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """Return the labels' normalised (and calibrated) log-probabilities; raise UserError for a refused question."""
        read = self.readings(questions, advance)
        if any(reading.refused for reading in read):
            fix = "take a model with a longer context, a shorter template, or lower data.max_prompt_tokens"
            raise UserError("a question is too long for the endpoint's model", "judge.endpoint", fix)
        if self.content_free:
            return [calibrated(reading.logprobs, self.content_free) for reading in read]
        return [normalise_labels(reading.logprobs) for reading in read]

    def both_orders(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[BothOrders]:
        """Return the log-odds of each pair in both orders, by a template of pairs."""
        odds = [log_odds(labels) for labels in self.labels(self.both_order_questions(triples), advance)]
        return [BothOrders(*two) for two in zip(odds[::2], odds[1::2], strict=True)]

    def points(
        self, answers: Sequence[tuple[str, str]], advance: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Return log-probabilities of the points of each (prompt, output), by a template of points."""
        return self.labels([_fields(self.template, (prompt, text, "")) for prompt, text in answers], advance)

    def preferences(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[float]:
        """Return the log-odds that the first output of each triple is better than the second."""
        if self.template.kind == "pair":
            return [both.preference for both in self.both_orders(triples, advance)]
        points = self.labels(self.both_order_questions(triples), advance)
        return [win_log_odds(a, b) for a, b in zip(points[::2], points[1::2], strict=True)]

    def utility_gaps(self, triples: Sequence[Triple], advance: Callable[[int], None] | None = None) -> list[float]:
        """Return `JudgeLabeler`'s utility of each triple's first output minus that of its second, from -1 to 1."""
        if self.template.kind == "pair":
            return [2 * sigmoid(both.preference) - 1 for both in self.both_orders(triples, advance)]
        points = [expected_points(labels) for labels in self.labels(self.both_order_questions(triples), advance)]
        return [(a - b) / (len(self.template.labels) - 1) for a, b in zip(points[::2], points[1::2], strict=True)]

    def questions_for(self, prompt: str, texts: Sequence[str]) -> list[Fields]:
        """Return all questions that ranking these outputs takes."""
        if self.template.kind == "pair":
            return self.both_order_questions([(prompt, a, b) for i, a in enumerate(texts) for b in texts[:i]])
        return [_fields(self.template, (prompt, text, "")) for text in texts]

    def questions_fit(self, prompt: str, texts: Sequence[str]) -> bool:
        """Return whether all questions about these outputs are short enough."""
        return all(self.reader.question_fits(self.template, fields) for fields in self.questions_for(prompt, texts))


def label_mass_summary(readings: Sequence[LabelReading], labels: int) -> dict[str, Any]:
    """Return the mean probability of all `labels` labels together, and counts of answers with bounds for some."""
    readings = [reading for reading in readings if not reading.refused]
    return {
        "answers": len(readings),
        "label_mass": fmean(reading.mass for reading in readings) if readings else None,
        "answers_with_bounds": sum(reading.bounded > 0 for reading in readings),
        "answers_without_label": sum(reading.bounded == labels for reading in readings),
    }


def question_key(question: Fields) -> str:
    """Return the key of a question among the answers."""
    return json.dumps(question, sort_keys=True)


def load_judge(recipe: Recipe, log: Path | None = None) -> Judge:
    """Return the judge of a recipe; raise UserError for a mistake in its section, or a model that cannot be loaded."""
    check_judge(recipe.judge)
    reader, identity = make_reader(recipe)
    return Judge(judge_template(recipe.judge), reader, log, identity, recipe.judge.calibrate)


def make_reader(recipe: Recipe) -> tuple[Reader, str]:
    """Return the recipe's reader, and a string that names its model and settings (`identity` of `Judge`)."""
    cfg = recipe.judge
    settings = f"reasoning {cfg.reasoning_tokens}"
    if cfg.endpoint:
        from rlhf.labeling.judge.endpoint import EndpointReader

        endpoint = EndpointReader(
            cfg.endpoint, cfg.model, cfg.reasoning_tokens, cfg.top_logprobs, cfg.concurrency, cfg.timeout_s
        )
        return endpoint, f"{cfg.endpoint} {cfg.model} top {cfg.top_logprobs} {settings}"
    local = _local_reader(recipe)
    commit = getattr(local.model.config, "_commit_hash", None)  # a Hub name may come to mean other weights
    chat = sha256(str(local.tokenizer.chat_template).encode()).hexdigest()[:16]  # prompt_format chooses it
    return local, f"{_content(judge_model(recipe))} {commit} {recipe.model.dtype} chat {chat} {settings}"


def judge_model(recipe: Recipe) -> str:
    """Return the name or folder of the local judge: judge.model, or else the model that the recipe starts from."""
    return recipe.judge.model or recipe.model.name


def _judge_section(recipe: Recipe) -> ModelSection:
    """Return the settings that the local judge's tokenizer is loaded with: another model is asked in its own format."""
    return recipe.model.in_its_own_format() if recipe.judge.model else recipe.model


def judge_files(cfg: JudgeSection) -> list[Path]:
    """Return the files and folders that the labels depend on."""
    named = (cfg.demonstrations, "" if cfg.endpoint else cfg.model)
    own = [Path(name).expanduser() for name in named if name]
    return [find_template(cfg.template, "judge"), *(path for path in own if path.exists())]


def check_context_fits(recipe: Recipe) -> None:
    """Check, before anything is sampled, that the judge takes the longest question that the recipe allows.

    Raises UserError when it is over judge.max_tokens, or over the positions of a local judge's model.
    """
    cfg, data = recipe.judge, recipe.data
    if cfg.endpoint:
        return
    config = load_config(resolve_model(_with_config(judge_model(recipe))), recipe.model)
    positions = getattr(config.get_text_config(), "max_position_embeddings", 0)
    limit = min(filter(None, (cfg.max_tokens, positions)), default=0)
    if not limit:
        return
    template = judge_template(cfg)
    tokenizer = load_tokenizer(judge_model(recipe), _judge_section(recipe))
    empty = question_tokens(tokenizer, template, _fields(template, ("", "", "")), cfg.reasoning_tokens)
    outputs = 2 if template.kind == "pair" else 1
    longest = empty + data.max_prompt_tokens + outputs * data.max_response_tokens
    if longest > limit:
        fix = f"raise it to {longest}, or take a shorter template"
        if longest > (positions or longest):
            fix = f"take a shorter template, or another model: this one has positions for {positions}"
        texts = f"{data.max_prompt_tokens} of the prompt and {outputs} x {data.max_response_tokens} of responses"
        what = f"questions to the judge may have {longest} tokens: {empty} of template {template.name}, {texts}"
        raise UserError(what, "judge.max_tokens", fix)


def warn_if_over_context(recipe: Recipe) -> None:
    """Warn, before anything is sampled, when the longest prompts and outputs are too long for the judge."""
    try:
        check_context_fits(recipe)
    except UserError as error:
        warn(f"{error.what}; prompts with longer ones are left out, or {error.fix} ({error.where})")


def _with_config(name: str) -> str:
    """Return the folder or name of a model's config: for an adapter, that of its base model."""
    adapter = find_adapter(name)
    return adapter.base.name if adapter else name


def _local_reader(recipe: Recipe) -> LocalReader:
    """Load the judge's model into this process."""
    from rlhf.models.zero import load_frozen_policy

    cfg, where = recipe.judge, judge_model(recipe)
    tokenizer = load_tokenizer(where, _judge_section(recipe))
    policy = load_frozen_policy(recipe, pick_device(recipe), where, tokenizer)
    return LocalReader(policy, tokenizer, cfg.batch_tokens, cfg.reasoning_tokens, cfg.max_tokens)


def _content(name: str) -> str:
    """Return the hash of a folder, whose content may change, and the name of anything else."""
    path = Path(name).expanduser()
    return hash_path(path) if path.is_dir() else name


def _fields(template: Template, triple: Triple) -> dict[str, str]:
    prompt, a, b = triple
    if template.kind == "pair":
        return {"prompt": prompt, "first": a, "second": b}
    return {"prompt": prompt, "response": a}


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of `size` items; the last one may be shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _read_log(path: Path | None, identity: str) -> dict[str, LabelReading]:
    """Return the answers in the log that were given under this identity."""
    fields = ("judge", "question", *LabelReading._fields)
    rows = complete_rows(path, fields, "its question is asked again") if path else []
    mine = [row for row in rows if row["judge"] == identity]
    return {row["question"]: LabelReading(tuple(row["logprobs"]), row["reasoning"], row["bounded"]) for row in mine}
