"""Load tokenizers with a pad token of their own and a chat template, and check that two of them are the same."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.chat_template import begins_with_bos, hold_settings
from rlhf.errors import UserError
from rlhf.model_config import ModelSection
from rlhf.models.resolve import hub_revision, not_loaded, resolve_model
from rlhf.system.console import note

PAD = "<|pad|>"
DEFAULT = ModelSection()
# Turns as in the published transcripts: "Human: ..\n\nAssistant: ..". %s is BOS for tokenizers that begin with it.
PLAIN = (
    "%s{%% for message in messages %%}"
    "{%% if message['role'] == 'user' %%}{{ 'Human: ' + message['content'] + '\\n\\n' }}"
    "{%% elif message['role'] == 'assistant' %%}{{ 'Assistant: ' + message['content'] + '\\n\\n' }}"
    "{%% else %%}{{ message['content'] + '\\n\\n' }}{%% endif %%}"
    "{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ 'Assistant:' }}{%% endif %%}"
)
VERBATIM = "%s{%% for message in messages %%}{{ message['content'] }}{%% endfor %%}"


def load_tokenizer(name_or_dir: str | Path, model: ModelSection = DEFAULT) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token other than EOS and a chat template, both of which are saved along with it.

    In a folder of the run both are there already, and loading it changes neither. `name_or_dir` is anything
    `resolve_model` takes; `model` gives the prompt format, and says whether code from the Hub may run. Raises UserError
    if there is no such tokenizer or it has no EOS token.
    """
    tokenizer = read_tokenizer(resolve_model(name_or_dir), model)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # With pad = EOS a model that looks for the last token that is not padding cannot see whether a text ended.
        tokenizer.add_special_tokens({"pad_token": _reserved(tokenizer) or PAD})
        note(f"{name_or_dir}: {tokenizer.pad_token} (id {tokenizer.pad_token_id}) serves as the tokenizer's pad token")
    if model.chat_template:
        tokenizer.chat_template = _read_template(model.chat_template)
    elif model.prompt_format == "verbatim":
        tokenizer.chat_template = VERBATIM % _bos(tokenizer)
    elif model.prompt_format == "plain" or not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN % _bos(tokenizer)
    hold_settings(tokenizer, model.template_date, model.chat_template_kwargs)
    return tokenizer


def read_tokenizer(where: str, model: ModelSection = DEFAULT) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or on the Hub as it is; raise UserError, with the file, if it cannot be read.

    Raises UserError too if it has no EOS token.
    """
    repository, revision = hub_revision(where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            repository, revision=revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises no narrower one for a file that it does not know
        raise not_loaded("tokenizer", _broken_file(where), error) from error
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token", where=where, fix="set eos_token in its tokenizer_config.json")
    return tokenizer


def _broken_file(where: str) -> str:
    """Return the first of a folder's tokenizer files that cannot be read alone; the folder or Hub name if all can."""
    for name, read in (("tokenizer_config.json", json.loads), ("tokenizer.json", Tokenizer.from_str)):
        file = Path(where) / name
        try:
            if file.is_file():
                read(file.read_text(encoding="utf-8"))
        except Exception:
            return str(file)
    return where


def _reserved(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a special token that is there for padding, or else for uses to come; empty if there is none."""
    free = set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    names = [tokenizer.added_tokens_decoder[i].content for i in sorted(free)]
    found = [name for word in ("pad", "reserved", "unused") for name in names if word in name.lower()]
    return next(iter(found), "")


def _read_template(name: str) -> str:
    """Return the text of a template's file; raise UserError if there is none."""
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        fix = "name a text file with a Jinja template, or leave model.chat_template empty"
        raise UserError(f"the chat template cannot be read: {error}", str(path), fix) from None


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Raise UserError, naming the first difference in special ids, vocabulary or merges, if two tokenizers differ."""
    names = f"{a.name_or_path} and {b.name_or_path}"
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if getattr(a, name) != getattr(b, name):
            raise _tokenizers_differ(f"{name} is {getattr(a, name)} and {getattr(b, name)}", names)
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))[0]
        raise _tokenizers_differ(f"token {token!r} has id {ours.get(token)} and {theirs.get(token)}", names)
    for i, (x, y) in enumerate(zip(_merges(a), _merges(b), strict=False)):
        if x != y:
            raise _tokenizers_differ(f"merge {i} is {x!r} and {y!r}", names)
    if len(_merges(a)) != len(_merges(b)):
        raise _tokenizers_differ(f"{len(_merges(a))} merges and {len(_merges(b))}", names)


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning of a chat template: BOS if the tokenizer begins every text with it."""
    return "{{ bos_token }}" if begins_with_bos(tokenizer) else ""


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[list[str] | str]:
    """Return the merges of a BPE tokenizer in order; empty for other kinds."""
    if not tokenizer.is_fast:
        return []
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])


def _tokenizers_differ(what: str, names: str) -> UserError:
    fix = "start the reward model from the SFT model, or from a model of the same family"
    return UserError(f"two models of this run have different tokenizers: {what}", names, fix)
