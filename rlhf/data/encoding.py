"""Turn prompts and responses into token ids, and drop records that are over the length limits.

A prompt and its response, which ends with the end of the turn if it is finished, are encoded separately and joined as
ids, so that a response has the same ids in every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf.data.chat_template import encode_turns, speaks_after_colon, turn_end
from rlhf.data.records import Demonstration, Drops, Prompt, Ranking

Item = TypeVar("Item", Prompt, Demonstration, Ranking)


@dataclass(frozen=True)
class Encoded(Generic[Item]):
    """A record with its token ids."""

    item: Item
    prompt: list[int]
    responses: list[list[int]]  # none for a prompt, one for a demonstration, K for a ranking


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the ids of the prompt in the chat template, up to where the assistant's answer begins; see `encode_turns`.

    Raises UserError, with the prompt's place, if the template refuses it.
    """
    return encode_turns(tokenizer, prompt.messages, prompt.place)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Return the ids of a response, with the end of the turn if it is finished.

    Names of special tokens inside the text are encoded as ordinary text, so that no text can end a turn. If the
    template ends in `Assistant:` (the plain format), the text gets one leading space, as the model would sample it.
    """
    if speaks_after_colon(tokenizer):
        text = " " + text.lstrip(" ")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, turn_end(tokenizer)] if finished else list(ids)


def fit_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_prompt: int, drops: Drops
) -> list[Encoded[Prompt]]:
    """Encode prompts; those of over `max_prompt` tokens are dropped and counted."""
    return _fit([Encoded(p, encode_prompt(tokenizer, p), []) for p in prompts], drops, max_prompt=max_prompt)


def fit_demonstrations(
    items: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt: int,
    max_response: int,
    max_tokens: int,
    drops: Drops,
) -> list[Encoded[Demonstration]]:
    """Encode demonstrations; drop and count those over a limit in tokens: of prompt, of response and end, of both."""
    rows = [Encoded(d, encode_prompt(tokenizer, d.prompt), [encode_response(tokenizer, d.response)]) for d in items]
    return _fit(rows, drops, max_prompt, max_response, max_tokens)


def fit_rankings(
    items: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, max_tokens: int, drops: Drops
) -> list[Encoded[Ranking]]:
    """Encode rankings; those with an output of over `max_tokens` tokens, prompt included, are dropped and counted."""
    rows = []
    for r in items:
        outputs = zip(r.responses, r.finished, strict=True)
        responses = [encode_response(tokenizer, text, finished) for text, finished in outputs]
        rows.append(Encoded(r, encode_prompt(tokenizer, r.prompt), responses))
    return _fit(rows, drops, max_tokens=max_tokens)


def _fit(
    rows: Sequence[Encoded[Item]],
    drops: Drops,
    max_prompt: int | None = None,
    max_response: int | None = None,
    max_tokens: int | None = None,
) -> list[Encoded[Item]]:
    kept = []
    for row in rows:
        longest = max(map(len, row.responses), default=0)
        if max_prompt is not None and len(row.prompt) > max_prompt:
            drops.add(f"prompt over {max_prompt} tokens")
        elif max_response is not None and longest > max_response:
            drops.add(f"response over {max_response} tokens")
        elif max_tokens is not None and len(row.prompt) + longest > max_tokens:
            drops.add(f"prompt and response over {max_tokens} tokens")
        else:
            kept.append(row)
    return kept
