"""Turn prompts and responses into token ids, and drop records that are over the length limits.

A prompt and its response, which ends with EOS if it is finished, are encoded separately and joined as ids, so that a
response has the same ids in every stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.records import Demonstration, Drops, Message, Prompt, Ranking

PRIVATE_USE = 0xF0000  # first of the code points that serve as placeholders while a text is encoded
Item = TypeVar("Item", Prompt, Demonstration, Ranking)


@dataclass(frozen=True)
class Encoded(Generic[Item]):
    """A record with its token ids."""

    item: Item
    prompt: list[int]
    responses: list[list[int]]  # none for a prompt, one for a demonstration, K for a ranking


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the ids of the prompt in the chat template, up to where the assistant's answer begins."""
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def encode_untrusted(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a dialogue whose messages contain text of models and strangers, up to the assistant's answer.

    Names of special tokens in the messages are encoded as ordinary text, so that no message can end or begin a turn by
    such a token. In the plain format turns are marked by words, which a message can contain.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = [name for name in special if any(name in message.content for message in messages)]
    marks = {chr(PRIVATE_USE + i): name for i, name in enumerate(names)}
    rows = [{"role": message.role, "content": message.content} for message in messages]
    if not marks:
        return list(tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False))
    for row in rows:
        for mark, name in marks.items():
            row["content"] = row["content"].replace(mark, " ").replace(name, mark)
    text = tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=False)
    ids: list[int] = []
    for part in filter(None, re.split(f"([{''.join(marks)}])", text)):
        spelled = part in marks
        ids += tokenizer(marks.get(part, part), add_special_tokens=False, split_special_tokens=spelled)["input_ids"]
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Return the ids of a response, with EOS at the end if it is finished.

    Names of special tokens inside the text are encoded as ordinary text, so that no text can end a turn. If the
    template ends in `Assistant:` (the plain format), the text gets one leading space, as the model would sample it.
    """
    if speaks_after_colon(tokenizer):
        text = " " + text.lstrip(" ")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if finished else list(ids)


def speaks_after_colon(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template ends in `Assistant:`."""
    probe = [{"role": "user", "content": "x"}]
    return tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False).endswith("Assistant:")


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """Return the ids that end a response: the tokenizer's EOS, then those of the model's generation config."""
    theirs = model.generation_config.eos_token_id if model is not None else None
    others = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    return list(dict.fromkeys([tokenizer.eos_token_id, *others]))


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
    """Encode demonstrations; drop and count those over a limit in tokens: of prompt, of response with EOS, of both."""
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
