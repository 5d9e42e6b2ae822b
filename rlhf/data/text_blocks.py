"""Token rows for language-model losses: blocks of plain text, and demonstrations with the tokens that are trained."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.data.encoding import Encoded
from rlhf.data.records import Demonstration
from rlhf.errors import UserError

MIN_BLOCK_TOKENS = 8  # a shorter rest has next to no context and would count as much per token as the others
TokenRow = dict[str, list[int]]  # input_ids, and completion_mask: 1 on tokens that are trained


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_tokens: int) -> list[list[int]]:
    """Each document as rows of `block_tokens` tokens; its last row may be shorter and is kept from 8 tokens on.

    Rows never span documents and hold no special tokens.
    """
    rows = []
    for text in texts:
        ids = token_ids(tokenizer, text)
        cut = [ids[i : i + block_tokens] for i in range(0, len(ids), block_tokens)]
        rows += [row for row in cut if len(row) >= min(MIN_BLOCK_TOKENS, block_tokens)]
    return rows


def demonstration_row(demonstration: Encoded[Demonstration]) -> TokenRow:
    """The prompt, and the response with its EOS; only the latter is trained."""
    prompt, response = demonstration.prompt, demonstration.responses[0]
    return {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}


def text_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[TokenRow]:
    """`count` rows of pretraining text, each of at most `length` tokens, every token trained; a text ends with EOS.

    Raises:
        UserError: when the texts are too short for that many rows.
    """
    rows = []
    for text in texts:
        ids = [
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            tokenizer.eos_token_id,
        ]
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        rows += [{"input_ids": p, "completion_mask": [1] * len(p)} for p in pieces if len(p) > 1]
    if len(rows) < count:
        raise UserError(
            f"the pretraining mix needs {count} rows of text and there are {len(rows)}",
            where="sft.pretraining_mix",
            fix="add text to data.pretraining or lower the mix",
        )
    return random.Random(seed).sample(rows, count)
