"""Ask a tokenizer's chat template: the ids of a dialogue, the token that ends a turn, and all that end a response.

One id ends a turn, in every stage: the one that the template writes after an assistant's answer, which need not be the
tokenizer's EOS. SFT and the reward model train it, sampling stops at it, and PPO scores every stopped response with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import yaml
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.records import Message
from rlhf.errors import UserError

PRIVATE_USE = 0xF0000  # first of the code points that serve as placeholders while a text is encoded
ANSWER = "An answer"  # after which a template is asked for its end
_ends: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, int]] = WeakKeyDictionary()  # the template and its end


def hold_settings(tokenizer: PreTrainedTokenizerBase, day: str, settings: Sequence[str] = ()) -> None:
    """Give the tokenizer's template its settings, NAME=VALUE with values in YAML, and the day that it sees.

    Templates that ask for the date would otherwise make another prompt of the same messages on every day. Raises
    UserError for a setting that is not of this form, or a day that does not exist.
    """
    given = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            fix = "write it as enable_thinking=false"
            raise UserError(f"{setting!r} is not NAME=VALUE", "model.chat_template_kwargs", fix)
        given[name] = yaml.safe_load(value)
    try:
        clock = datetime.fromisoformat(day)
    except ValueError:
        raise UserError(f"{day} is no day of the calendar", "model.template_date", "write it as 2024-07-26") from None
    tokenizer.template_settings, tokenizer.template_clock = given, clock


def encode_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: str = "") -> list[int]:
    """Return the ids of a dialogue up to where the assistant's answer begins.

    Names of special tokens in the messages are encoded as ordinary text, so that no message can end or begin a turn by
    such a token. In the plain format turns are marked by words, which a message can contain. Raises UserError with the
    place of the dialogue if the template refuses it, or does not know one of its roles.
    """
    for role in {message.role for message in messages} - {"system", "user", "assistant"}:
        if role not in str(tokenizer.chat_template):
            fix = "give the message another role, or a template that knows this one (model.chat_template)"
            raise UserError(f"the chat template knows no role {role!r}", place or "the chat template", fix)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = [name for name in special if any(name in message.content for message in messages)]
    marks = {chr(PRIVATE_USE + i): name for i, name in enumerate(names)}
    rows = [{"role": message.role, "content": message.content} for message in messages]
    if not marks:
        return list(_apply(tokenizer, rows, place, add_generation_prompt=True, return_dict=False))
    for row in rows:
        for mark, name in marks.items():
            row["content"] = row["content"].replace(mark, " ").replace(name, mark)
    text = _apply(tokenizer, rows, place, add_generation_prompt=True, tokenize=False)
    ids: list[int] = []
    for part in filter(None, re.split(f"([{''.join(marks)}])", text)):
        spelled = part in marks
        ids += tokenizer(marks.get(part, part), add_special_tokens=False, split_special_tokens=spelled)["input_ids"]
    return ids


def _apply(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], place: str, **how: Any) -> Any:
    """Return what the template makes of messages; raise UserError, with their place, if it refuses them."""
    try:
        return tokenizer.apply_chat_template(rows, **_settings(tokenizer), **how)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(row["role"] for row in rows)
        what = f"the chat template refuses these messages ({roles}): {error}"
        fix = "put a system message's words into the first user message, let user and assistant take turns, or give "
        fix += "another template: model.prompt_format=plain"
        raise UserError(what, place or f"the chat template of {tokenizer.name_or_path}", fix) from None


def _settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what the template is called with: its settings, and itself with the clock held where it asks for one."""
    settings, clock = getattr(tokenizer, "template_settings", {}), getattr(tokenizer, "template_clock", None)
    if clock is None or "strftime_now" not in str(tokenizer.chat_template):
        return settings
    return settings | {"chat_template": _at(clock, tokenizer.chat_template)}


@lru_cache(maxsize=8)
def _at(clock: datetime, template: str) -> str:
    """Return the template after a macro that answers its calls of `strftime_now`, in place of the system's clock."""
    formats = re.findall(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')""", template)
    found = {text: clock.strftime(text) for pair in formats for text in pair if text}
    # An expression ends the macro, since a block would take a line's end after it away.
    macro = f"{{% macro strftime_now(format) %}}{{{{ {json.dumps(found)}[format] }}}}{{% endmacro %}}"
    return f"{macro}{{{{ '' }}}}{template}"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that the chat template writes after an assistant's answer; EOS if it writes no token there."""
    known = _ends.get(tokenizer)
    if known is None or known[0] != tokenizer.chat_template:
        rows = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": ANSWER}]
        _, answered, after = _apply(tokenizer, rows, "", tokenize=False).rpartition(ANSWER)
        names = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        ends = [name for name in names if answered and after.lstrip().startswith(name)]
        known = (tokenizer.chat_template, names[max(ends, key=len)] if ends else int(tokenizer.eos_token_id))
        _ends[tokenizer] = known
    return known[1]


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """Return the ids that end a response: the turn's end first, the tokenizer's EOS, those of the generation config."""
    theirs = model.generation_config.eos_token_id if model is not None else None
    others = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    return list(dict.fromkeys([turn_end(tokenizer), tokenizer.eos_token_id, *others]))


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer begins every text with BOS."""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def speaks_after_colon(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template ends in `Assistant:`."""
    rows = [{"role": "user", "content": "x"}]
    return _apply(tokenizer, rows, "", add_generation_prompt=True, tokenize=False).endswith("Assistant:")
