"""Look at the models of a recipe before anything is trained: what would make a stage fail, or train something else.

Only configs, tokenizers and a small random copy are looked at, never the weights. The built-in models are known to be
good; of them the context alone is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PretrainedConfig

from rlhf.config import Recipe
from rlhf.data.records import read_cloze
from rlhf.data.sources import local_path
from rlhf.data.text_blocks import encode_question
from rlhf.errors import UserError
from rlhf.models import smollm2, tiny
from rlhf.models.auto_classes import causal_class
from rlhf.models.loading import check_positions
from rlhf.models.logit_map import verified_map
from rlhf.models.packing_probe import keeps_documents_apart, small_copies
from rlhf.models.peft.folder import find_adapter
from rlhf.models.pretrained import check_attention, is_classifier, is_reward_model, load_config
from rlhf.models.resolve import BUILT_IN, looks_like_path, resolve_model
from rlhf.models.tokenizer import read_tokenizer
from rlhf.plan import row_limits
from rlhf.system.console import note


def check_models(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise UserError if the given stages could not use a model of the recipe as it says.

    A model that cannot be reached, or that a stage has yet to write, is let pass. Only SFT needs model.name itself.
    """
    policy = _look_at(recipe, "model.name", needed="sft" in stages)
    reward = policy
    if "reward" in stages and recipe.reward.model != "sft":
        reward = _look_at(recipe, "reward.model", needed=not recipe.reward.train)
        if not recipe.reward.train:
            _check_scores(recipe, reward)
    if recipe.rank.reward_model and _labels(recipe, stages, "reward_model"):
        _look_at(recipe, "rank.reward_model")
    if recipe.judge.model and not recipe.judge.endpoint and _labels(recipe, stages, "judge"):
        _look_at(recipe, "judge.model")
    for limit in row_limits(recipe, stages):
        config, peft = (policy, recipe.model.peft) if limit.model == "policy" else (reward, recipe.reward_peft)
        if config is not None:
            check_positions(config, peft, limit.tokens, limit.field)
    if policy is None or recipe.model.name in BUILT_IN:
        return
    _check_logits(recipe, policy)
    if "sft" in stages and recipe.sft.packing:
        _check_packing(recipe, policy)
    if "evaluate" in stages:
        _check_cloze(recipe, policy)


def _labels(recipe: Recipe, stages: Sequence[str], labeler: str) -> bool:
    """Return whether one of the stages asks the labeler."""
    sections = {"rank": recipe.rank.labeler, "evaluate": recipe.evaluate.labeler}
    return any(sections[stage] == labeler for stage in stages if stage in sections)


def _look_at(recipe: Recipe, field: str, needed: bool = False) -> PretrainedConfig | None:
    """Return the config of the model that a field names, after a look at its kernel and its tokenizer.

    Returns None if the model is not here. Raises UserError if it is here and cannot be used, or if it is `needed` and
    the name of a folder that does not exist.
    """
    section, _, key = field.partition(".")
    name = getattr(getattr(recipe, section), key)
    if name in BUILT_IN:
        return tiny.config() if name == tiny.NAME else smollm2.model_config()
    if not needed and not Path(name).expanduser().exists() and looks_like_path(name):
        return None
    try:
        adapter = find_adapter(name)
        where = resolve_model(adapter.base.name if adapter else name)
        config = load_config(where, recipe.model)
        if Path(where).is_dir():
            read_tokenizer(where, recipe.model)
    except UserError as error:
        if isinstance(error.__cause__, OSError) and not Path(name).expanduser().exists():
            return None  # on the Hub, and not reached
        raise UserError(error.what, f"{error.where} ({field})", error.fix) from error
    kind = AutoModelForSequenceClassification if is_classifier(config) else causal_class(config)
    check_attention(kind, config, recipe.model.attention)
    return config


def _check_scores(recipe: Recipe, config: PretrainedConfig | None) -> None:
    """Raise UserError if the model that is to be used as it is gives no single score."""
    adapter = find_adapter(recipe.reward.model)
    scores = adapter.scalar if adapter else config is None or is_reward_model(config)
    if not scores:
        what = f"reward.train is false, and {recipe.reward.model} is no reward model"
        raise UserError(what, "reward.model", "name a sequence classifier with one label, or set reward.train=true")


def _check_logits(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise UserError if the architecture does something unknown to its logits, which loading the policy would find."""
    for copied in small_copies(config, recipe.model):
        try:
            verified_map(copied)
        except UserError:
            raise
        except Exception:  # a cut that the architecture does not bear; another one may work
            continue
        return


def _check_packing(recipe: Recipe, config: PretrainedConfig) -> None:
    apart = keeps_documents_apart(config, recipe.model)
    if apart is None:
        note(
            f"{config.model_type}, {recipe.model.attention} attention: it could not be tried whether the "
            "demonstrations of a packed row see each other; sft.packing=false is safe"
        )
    elif not apart:
        what = f"{config.model_type} does not keep the demonstrations of a packed row apart: "
        what += "each would be trained with the ones before it in sight"
        raise UserError(what, "sft.packing", "set sft.packing=false")


def _check_cloze(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise UserError if a cloze question is longer than the context; files on the Hub are read in the stage alone."""
    where, sources = resolve_model(recipe.model.name), recipe.data.cloze
    if not Path(where).is_dir() or not all(map(local_path, sources)):
        return
    tokenizer = read_tokenizer(where, recipe.model)
    questions = read_cloze(sources)[: recipe.evaluate.cloze_questions or None]
    rows = (pair for question in questions for pair in encode_question(tokenizer, question))
    longest = max((len(context) + len(choice) for context, choice in rows), default=0)
    check_positions(config, recipe.model.peft, longest, "data.cloze")
