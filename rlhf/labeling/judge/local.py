"""A local language model's answers, read off a verbalizer: the log-probabilities of label words, no text is parsed.

The question is encoded as a dialogue; the assistant's turn begins with the template's cue, and the next token is where
the labels are compared. With chain-of-thought the model first writes its reasoning, greedily and bounded, and the cue
comes after it. Should it write the cue itself, its words from there on are dropped, and the labels are read the same.

"Verbalizer" is Schick and Schütze's word (2021, arXiv 2001.07676): the map from answers to words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.encoding import encode_untrusted, speaks_after_colon, stop_ids
from rlhf.data.prompt_template import Template, assistant_answer
from rlhf.errors import UserError
from rlhf.models.placement import materialized
from rlhf.rollout.batches import token_budget_batches
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import candidate_logprobs, gather_in_order, next_token_logprobs, token_logprobs
from rlhf.rollout.shared_prompts import build_shared, can_share, last_states, share_prompts
from rlhf.system.distributed import processes, shard

Fields = Mapping[str, str]
SPARE = 8  # tokens kept for the label and for what encoding it anew may add
SHARED_TOKENS = 128  # a shorter beginning is not worth the copies that attention makes of it
MAX_ROWS = 32  # questions that are reasoned about together


class LabelReading(NamedTuple):
    """What a model said to one question.

    `logprobs` has one entry for each label, in nats, given what all labels begin with, and none where the question was
    refused as too long. `bounded` counts labels of which only an upper bound is known
    (rlhf/labeling/judge/endpoint.py).
    """

    logprobs: tuple[float, ...]
    reasoning: str = ""
    bounded: int = 0

    @property
    def refused(self) -> bool:
        """Whether there is no answer, because the question is too long for who was asked."""
        return not self.logprobs

    @property
    def mass(self) -> float:
        """Probability of the labels together: far below 1, the model would rather have said something else."""
        return sum(math.exp(logprob) for logprob in self.logprobs)


class LocalReader:
    """Asks a model of this process, or of all processes of a distributed run, which must then ask the same.

    Args:
        batch_tokens: tokens of a pass.
        reasoning_tokens: most that are written before the cue.
        max_tokens: longest question with its reasoning; 0: what the model has positions for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = 4096,
        reasoning_tokens: int = 96,
        max_tokens: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.reasoning_tokens = batch_tokens, reasoning_tokens
        positions = getattr(model.config, "max_position_embeddings", None)
        self.shares: bool | None = None  # found out when there are demonstrations, the same before every question
        self.max_tokens = min(filter(None, [max_tokens, positions]), default=0)

    def question_fits(self, template: Template, fields: Fields) -> bool:
        """Whether the question, with the longest reasoning, is within the limit."""
        tokens = question_tokens(self.tokenizer, template, fields, self.reasoning_tokens)
        return not self.max_tokens or tokens <= self.max_tokens

    def read(
        self,
        template: Template,
        questions: Sequence[Fields],
        advance: Callable[[int], None] | None = None,
        keep: Callable[[dict[int, LabelReading]], None] | None = None,
    ) -> list[LabelReading]:
        """The labels' log-probabilities for every question.

        Args:
            advance, keep: as of rlhf/labeling/judge/judge.py's Reader.

        Raises:
            UserError: for a question over the limit, before any is asked.
        """
        if not all(self.question_fits(template, fields) for fields in questions):
            raise UserError(
                f"a question to the judge has more than {self.max_tokens} tokens",
                "judge.max_tokens",
                "raise it, up to the positions of the model, or take a shorter template",
            )
        found: list[LabelReading] = []
        # Reasoning takes long: a few questions at a time, so that progress shows.
        size = MAX_ROWS if template.reasons else max(1, len(questions))
        for first in range(0, len(questions), size):
            answers = self._read(template, questions[first : first + size], advance)
            if keep:
                keep(dict(enumerate(answers, first)))
            found += answers
        return found

    def _read(
        self, template: Template, questions: Sequence[Fields], advance: Callable[[int], None] | None
    ) -> list[LabelReading]:
        prompts = [encode_untrusted(self.tokenizer, template.messages(fields)) for fields in questions]
        thoughts = self._reason(template, prompts) if template.reasons else [""] * len(prompts)
        cut = [
            label_ids(self.tokenizer, prompt, assistant_answer(thought, template.cue), template.labels)
            for prompt, thought in zip(prompts, thoughts, strict=True)
        ]
        if template.examples and self.shares is None:
            self.shares = can_share(self.model)
        logprobs = label_logprobs(self.model, cut, self.batch_tokens, advance, bool(self.shares))
        return [LabelReading(*both) for both in zip(logprobs, thoughts, strict=True)]

    def _reason(self, template: Template, prompts: Sequence[list[int]]) -> list[str]:
        longest = max(map(len, prompts)) + self.reasoning_tokens
        params = SamplingParams(
            max_new_tokens=self.reasoning_tokens,
            temperature=0,
            stop_ids=stop_ids(self.tokenizer, self.model),
            batch_size=max(1, self.batch_tokens // longest),
        )
        rollout = sample(self.model, self.tokenizer, prompts, params, seeds=[0] * len(prompts))
        return [text.split(template.cue)[0].strip() for text in rollout.texts(self.tokenizer)]


def question_tokens(
    tokenizer: PreTrainedTokenizerBase, template: Template, fields: Fields, reasoning_tokens: int
) -> int:
    """Tokens of a question with cue and label, and with the longest reasoning where the template has any."""
    prompt = encode_untrusted(tokenizer, template.messages(fields))
    cue = tokenizer(template.cue, add_special_tokens=False)["input_ids"]
    return len(prompt) + len(cue) + SPARE + reasoning_tokens * template.reasons


def label_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], said: str, labels: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """What stands before the labels and the ids of each, the cut being where their encodings first differ.

    Args:
        prompt: the dialogue up to where the assistant speaks.
        said: what the assistant has said so far; a label follows after a blank, or at once where it has said nothing.
    """
    blank = " " if speaks_after_colon(tokenizer) else ""
    full = [
        tokenizer(blank + (f"{said} {label}" if said else label), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        for label in labels
    ]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*full, strict=False)))
    return [*prompt, *full[0][:shared]], [ids[shared:] for ids in full]


def label_logprobs(
    model: PreTrainedModel,
    cut: Sequence[tuple[list[int], list[list[int]]]],
    batch_tokens: int,
    advance: Callable[[int], None] | None = None,
    share: bool = False,
) -> list[tuple[float, ...]]:
    """Log-probability of every label of every question; labels of one token each share one pass.

    Args:
        cut: context and label ids of each question, as from `label_ids`.
        share: what all contexts begin with is seen once a batch, for models that `can_share` prompts.
    """
    found: list[tuple[float, ...]] = [()] * len(cut)
    groups: dict[tuple[int, ...], list[int]] = {}  # questions by their labels, where these are single tokens
    for i, (_, labels) in enumerate(cut):
        if all(len(ids) == 1 for ids in labels):
            groups.setdefault(tuple(ids[0] for ids in labels), []).append(i)
    for candidates, places in groups.items():
        contexts = [cut[i][0] for i in places]
        begin = len(commonprefix(contexts)[:-1]) if share else 0
        if begin >= SHARED_TOKENS and len(contexts) > 1:
            rows = _after_prefix(model, contexts, begin, candidates, batch_tokens, advance)
        else:
            rows = next_token_logprobs(model, contexts, candidates, batch_tokens, advance)
        for i, row in zip(places, rows, strict=True):
            found[i] = tuple(row.tolist())
    longer = [i for i in range(len(cut)) if not found[i]]
    pairs = [(cut[i][0], ids) for i in longer for ids in cut[i][1]]
    sums = iter([float(row.double().sum()) for row in token_logprobs(model, pairs, 1.0, batch_tokens)] if pairs else [])
    for i in longer:
        found[i] = tuple(next(sums) for _ in cut[i][1])
    if advance and longer:
        advance(len(longer))
    return found


def _after_prefix(
    model: PreTrainedModel,
    contexts: Sequence[list[int]],
    begin: int,
    candidates: Sequence[int],
    tokens: int,
    advance: Callable[[int], None] | None,
) -> list[Tensor]:
    """As `next_token_logprobs`, of contexts whose first `begin` tokens are the same; the model is in eval mode."""
    prefix, by_length = contexts[0][:begin], sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    rests = [contexts[i][begin:] for i in shard(by_length)]
    mine = [torch.empty(0)] * len(rests)
    with torch.no_grad(), materialized(model), share_prompts(model):
        for batch in token_budget_batches([len(rest) for rest in rests], max(1, tokens - begin)):
            last = last_states(model, build_shared([(prefix, rests[i]) for i in batch]).to(model.device))
            for i, row in zip(batch, candidate_logprobs(model, last, candidates), strict=True):
                mine[i] = row.cpu()
            if advance:
                advance(len(batch) * processes())
    return gather_in_order(by_length, mine)
