"""Ask a local language model and read its answers off a verbalizer: log-probabilities of label words, no parsed text.

The question is encoded as a dialogue. The assistant's turn begins with the template's cue, and the labels are compared
as the next token. With chain-of-thought the model first writes its reasoning, greedily and up to a length, and the cue
follows. If the model writes the cue itself, its words from the cue on are dropped. "Verbalizer" is Schick and Schütze's
word (2021, arXiv 2001.07676): the map from answers to words of the vocabulary.
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

from rlhf.data.chat_template import encode_turns, speaks_after_colon, stop_ids
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
SPARE = 8  # tokens reserved for the label, and for what its encoding with the cue may add
SHARED_TOKENS = 128  # a shorter common prefix is not worth the copies that attention makes of it
MAX_ROWS = 32  # questions for which reasoning is sampled together


class LabelReading(NamedTuple):
    """A model's answer to one question."""

    logprobs: tuple[float, ...]  # of each label, in nats, given what all labels begin with; empty: refused as too long
    reasoning: str = ""
    bounded: int = 0  # labels of which only an upper bound is known (rlhf/labeling/judge/endpoint.py)

    @property
    def refused(self) -> bool:
        """Return whether the endpoint refused the question as too long."""
        return not self.logprobs

    @property
    def mass(self) -> float:
        """Return the probability of all labels together: if it is far below 1, the model would say something else."""
        return sum(math.exp(logprob) for logprob in self.logprobs)


class LocalReader:
    """A `Reader` that asks a model of this process. All processes of a distributed run must ask the same questions."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = 4096,  # at most, in a pass
        reasoning_tokens: int = 96,  # at most, before the cue
        max_tokens: int = 0,  # of a question with its reasoning; 0 allows all positions of the model
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.reasoning_tokens = batch_tokens, reasoning_tokens
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.shares: bool | None = None  # whether the model can share demonstrations; None until there are some
        self.max_tokens = min(filter(None, [max_tokens, positions]), default=0)

    def question_fits(self, template: Template, fields: Fields) -> bool:
        """Return whether the question, with reasoning of the maximum length, is within the limit."""
        tokens = question_tokens(self.tokenizer, template, fields, self.reasoning_tokens)
        return not self.max_tokens or tokens <= self.max_tokens

    def read(
        self,
        template: Template,
        questions: Sequence[Fields],
        advance: Callable[[int], None] | None = None,
        keep: Callable[[dict[int, LabelReading]], None] | None = None,
    ) -> list[LabelReading]:
        """Read as `Reader.read` says. Raises UserError for a question over the limit, before any question is asked."""
        if not all(self.question_fits(template, fields) for fields in questions):
            fix = "raise it, up to the positions of the model, or take a shorter template"
            raise UserError(f"a question to the judge has more than {self.max_tokens} tokens", "judge.max_tokens", fix)
        found: list[LabelReading] = []
        # Reasoning takes long, so it is sampled for a few questions at a time to show progress.
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
        prompts = [encode_turns(self.tokenizer, template.messages(fields)) for fields in questions]
        thoughts = self._reason(template, prompts) if template.reasons else [""] * len(prompts)
        encoded = [
            label_ids(self.tokenizer, prompt, assistant_answer(thought, template.cue), template.labels)
            for prompt, thought in zip(prompts, thoughts, strict=True)
        ]
        if template.examples and self.shares is None:
            self.shares = can_share(self.model)
        logprobs = label_logprobs(self.model, encoded, self.batch_tokens, advance, bool(self.shares))
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
    """Return the tokens of a question with cue and label, and with the longest reasoning where the template has any."""
    prompt = encode_turns(tokenizer, template.messages(fields))
    cue = tokenizer(template.cue, add_special_tokens=False)["input_ids"]
    return len(prompt) + len(cue) + SPARE + reasoning_tokens * template.reasons


def label_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], said: str, labels: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the ids before the labels and the ids of each label, split where the labels' encodings first differ.

    `prompt` ends before the assistant's turn. A label follows `said` after a blank, or directly where that is empty.
    """
    blank = " " if speaks_after_colon(tokenizer) else ""
    texts = [blank + (f"{said} {label}" if said else label) for label in labels]
    encoded = (tokenizer(text, add_special_tokens=False, split_special_tokens=True) for text in texts)
    full = [each["input_ids"] for each in encoded]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*full, strict=False)))
    return [*prompt, *full[0][:shared]], [ids[shared:] for ids in full]


def label_logprobs(
    model: PreTrainedModel,
    encoded: Sequence[tuple[list[int], list[list[int]]]],
    batch_tokens: int,
    advance: Callable[[int], None] | None = None,
    share: bool = False,
) -> list[tuple[float, ...]]:
    """Return the log-probability of every label of every question; labels of one token each share one pass.

    With `share`, for models that `can_share` prompts, the common prefix of all contexts is computed once a batch.
    """
    found: list[tuple[float, ...]] = [()] * len(encoded)
    groups: dict[tuple[int, ...], list[int]] = {}  # questions whose labels are these single tokens
    for i, (_, labels) in enumerate(encoded):
        if all(len(ids) == 1 for ids in labels):
            groups.setdefault(tuple(ids[0] for ids in labels), []).append(i)
    for candidates, group in groups.items():
        contexts = [encoded[i][0] for i in group]
        shared = len(commonprefix(contexts)[:-1]) if share else 0
        if shared >= SHARED_TOKENS and len(contexts) > 1:
            rows = _after_prefix(model, contexts, shared, candidates, batch_tokens, advance)
        else:
            rows = next_token_logprobs(model, contexts, candidates, batch_tokens, advance)
        for i, row in zip(group, rows, strict=True):
            found[i] = tuple(row.tolist())
    longer = [i for i in range(len(encoded)) if not found[i]]
    pairs = [(encoded[i][0], ids) for i in longer for ids in encoded[i][1]]
    sums = iter([float(row.double().sum()) for row in token_logprobs(model, pairs, 1.0, batch_tokens)] if pairs else [])
    for i in longer:
        found[i] = tuple(next(sums) for _ in encoded[i][1])
    if advance and longer:
        advance(len(longer))
    return found


def _after_prefix(
    model: PreTrainedModel,
    contexts: Sequence[list[int]],
    shared: int,
    candidates: Sequence[int],
    batch_tokens: int,
    advance: Callable[[int], None] | None,
) -> list[Tensor]:
    """Return `next_token_logprobs` of contexts whose first `shared` tokens are equal; needs the model in eval mode."""
    prefix, by_length = contexts[0][:shared], sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    rests = [contexts[i][shared:] for i in shard(by_length)]
    mine = [torch.empty(0)] * len(rests)
    with torch.no_grad(), materialized(model), share_prompts(model):
        for batch in token_budget_batches([len(rest) for rest in rests], max(1, batch_tokens - shared)):
            last = last_states(model, build_shared([(prefix, rests[i]) for i in batch]).to(model.device))
            for i, row in zip(batch, candidate_logprobs(model, last, candidates), strict=True):
                mine[i] = row.cpu()
            if advance:
                advance(len(batch) * processes())
    return gather_in_order(by_length, mine)
