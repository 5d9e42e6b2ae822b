"""The alignment tax: the loss of a policy on text and questions that it was not aligned on (paper section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Cloze
from rlhf.data.text_blocks import MIN_BLOCK_TOKENS, encode_question
from rlhf.errors import UserError
from rlhf.functional.statistics import Interval, wilson_interval
from rlhf.rollout.scoring import token_logprobs


def pretraining_loss(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    tokens_per_batch: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Return the mean negative log-likelihood per predicted token, in nats, and the number of predicted tokens.

    The first token of a row of ids is context only. `advance` is called with the number of rows done, for progress.
    Raises UserError if no row has two tokens.
    """
    pairs = [(row[:1], row[1:]) for row in rows if len(row) > 1]
    if not pairs:
        what = "there is no held-out text to measure the pretraining loss on"
        fix = f"name files with documents of at least {MIN_BLOCK_TOKENS} tokens"
        raise UserError(what, "data.pretraining_heldout", fix)
    logprobs = token_logprobs(model, pairs, 1.0, tokens_per_batch, advance)
    count = sum(len(row) for row in logprobs)
    return -sum(float(row.double().sum()) for row in logprobs) / count, count


@dataclass(frozen=True)
class ClozeResult:
    """Accuracies with their Wilson intervals; `accuracy` is the headline."""

    accuracy: Interval  # highest log-likelihood per byte of the choice (lm-eval calls it acc_bytes)
    accuracy_sum: Interval  # highest summed log-likelihood (lm-eval's acc): favours short choices
    n: int

    def row(self) -> dict[str, float]:
        """Return the fields of a policy's row in results.json."""
        return {
            "cloze_accuracy": self.accuracy.mean,
            "cloze_low": self.accuracy.low,
            "cloze_high": self.accuracy.high,
            "cloze_accuracy_sum": self.accuracy_sum.mean,
            "cloze_n": self.n,
        }


def cloze_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Cloze],
    tokens_per_batch: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> ClozeResult:
    """Return the share of questions whose right choice is the most likely; raise UserError if there are no questions.

    The headline divides each choice's summed log-probability by its length in UTF-8 bytes; the undivided one is
    reported too. Ties go to the earlier choice. `advance` is called with the number of choices done, for progress.
    """
    if not questions:
        raise UserError("there are no cloze questions", where="data.cloze", fix="name a file with cloze questions")
    pairs = [pair for question in questions for pair in encode_question(tokenizer, question)]
    sums = [float(row.double().sum()) for row in token_logprobs(model, pairs, 1.0, tokens_per_batch, advance)]
    right = right_sum = first = 0
    for question in questions:
        choice_sums = sums[first : first + len(question.choices)]
        first += len(question.choices)
        per_byte = [s / len(choice.encode()) for s, choice in zip(choice_sums, question.choices, strict=True)]
        right += per_byte.index(max(per_byte)) == question.answer
        right_sum += choice_sums.index(max(choice_sums)) == question.answer
    n = len(questions)
    return ClozeResult(wilson_interval(right, n), wilson_interval(right_sum, n), n)
