"""Make token rows of texts: blocks for a loss, demonstrations with a mask of trained tokens, and cloze questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from rlhf.data.chat_template import begins_with_bos, encode_turns
from rlhf.data.encoding import Encoded, encode_response
from rlhf.data.records import Cloze, Demonstration
from rlhf.errors import UserError

MIN_BLOCK_TOKENS = 8  # tokens of a shorter last row have almost no context and would weigh as much as others
TokenRow = dict[str, list[int]]  # input_ids, and completion_mask: 1 on trained tokens


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of plain text alone; names of special tokens in it are encoded as ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a row of text begins with: BOS where the tokenizer begins every text with it, else none."""
    return [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []


def token_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_tokens: int) -> list[list[int]]:
    """Cut each document into rows of `block_tokens` ids, each after `first_ids`; a shorter last row needs at least 8.

    BOS counts among the ids of a row, so that no row is longer than `block_tokens`.
    """
    first = first_ids(tokenizer)
    least = len(first) + min(MIN_BLOCK_TOKENS, block_tokens - len(first))
    rows = (row for text in texts for row in _cut(text_ids(tokenizer, text), first, block_tokens))
    return [row for row in rows if len(row) >= least]


def _cut(ids: Sequence[int], first: Sequence[int], length: int) -> list[list[int]]:
    """Return the ids in rows of at most `length`, each after `first`."""
    size = length - len(first)
    return [[*first, *ids[i : i + size]] for i in range(0, len(ids), size)]


def demonstration_row(demonstration: Encoded[Demonstration], history: Sequence[int] = ()) -> TokenRow:
    """Return prompt and response as one row; only the response with its end is trained.

    `history` is a mask over the prompt of what is trained of it too (see `earlier_answers`).
    """
    prompt, response = demonstration.prompt, demonstration.responses[0]
    return {"input_ids": prompt + response, "completion_mask": [*(history or [0] * len(prompt)), *[1] * len(response)]}


def earlier_answers(demonstration: Encoded[Demonstration], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a mask over the prompt, 1 on the assistant's earlier answers and the end of their turns.

    An answer that the template writes otherwise once another turn follows, without its thoughts for instance, is left
    out: the model would not be asked for it so. Where a template marks ends by words, these are not trained.
    """
    prompt, said = demonstration.prompt, demonstration.item.prompt
    mask = [0] * len(prompt)
    for i, message in enumerate(said.messages):
        if message.role != "assistant" or i == 0:
            continue
        before = encode_turns(tokenizer, said.messages[:i], said.place)
        for answer in (encode_response(tokenizer, message.content, ended) for ended in (True, False)):
            end = len(before) + len(answer)
            if prompt[:end] == [*before, *answer]:
                mask[len(before) : end] = [1] * len(answer)
                break
    return mask


def text_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[TokenRow]:
    """Draw `count` rows of up to `length` tokens, each text ended by EOS; raise UserError if there are fewer."""
    rows, first = [], first_ids(tokenizer)
    for text in texts:
        blocks = _cut([*text_ids(tokenizer, text), tokenizer.eos_token_id], first, length)
        rows += [{"input_ids": block, "completion_mask": [1] * len(block)} for block in blocks if len(block) > 1]
    if len(rows) < count:
        what = f"the pretraining mix needs {count} rows of text and there are {len(rows)}"
        raise UserError(what, "sft.pretraining_mix", "add text to data.pretraining or lower the mix")
    return random.Random(seed).sample(rows, count)


def encode_question(tokenizer: PreTrainedTokenizerBase, question: Cloze) -> list[tuple[list[int], list[int]]]:
    """Return (context ids, choice ids) for each choice of `context + " " + choice`.

    The cut is where the encodings first differ: all choices are scored from there on, even if a token spans the border.
    """
    texts = [question.context, *(f"{question.context.rstrip()} {choice}" for choice in question.choices)]
    alone, *full = ([*first_ids(tokenizer), *text_ids(tokenizer, text)] for text in texts)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(alone, *full, strict=False)))
    cut = max(1, shared)  # the first token has nothing to be predicted from
    return [(ids[:cut], ids[cut:]) for ids in full]
