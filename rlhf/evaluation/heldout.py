"""What evaluate asks every policy: held-out prompts, text and questions, less what a training stage has seen."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import fit_prompts
from rlhf.data.records import (
    Cloze,
    Drops,
    Prompt,
    read_cloze,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_texts,
)
from rlhf.data.text_blocks import token_blocks
from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed


@dataclass
class HeldOut:
    """What every policy is asked."""

    prompts: list[Prompt]
    ids: list[list[int]]  # encoded prompts, each repeated samples_per_prompt times in a row
    seeds: list[int]  # one for each row of ids, the same for every policy
    text_rows: list[list[int]]  # held-out pretraining text
    cloze: list[Cloze]


def unseen_prompts(recipe: Recipe, drops: Drops) -> list[Prompt]:
    """The held-out prompts less those that a training stage has seen, counted."""
    data, apart = recipe.data, Drops()  # drops of the training files are the other stages' to count
    seen = {row.key for row in read_prompts(data.prompts, apart)} if data.prompts else set()
    seen |= {row.prompt.key for row in read_demonstrations(data.demonstrations, apart)}
    seen |= {row.prompt.key for row in read_rankings(data.rankings, apart)} if data.rankings else set()
    prompts = read_prompts(data.prompts_heldout, drops)
    kept = [prompt for prompt in prompts if prompt.key not in seen]
    if len(kept) < len(prompts):
        drops.add("held-out prompt that is also in the training data", len(prompts) - len(kept))
    return kept


def unseen_texts(recipe: Recipe, drops: Drops) -> list[str]:
    """The held-out texts less those that are trained on, counted."""
    data = recipe.data
    seen = set(read_texts(data.pretraining, Drops())) if data.pretraining else set()
    texts = read_texts(data.pretraining_heldout, drops) if data.pretraining_heldout else []
    kept = [text for text in texts if text not in seen]
    if len(kept) < len(texts):
        drops.add("held-out text that is also in the training data", len(texts) - len(kept))
    return kept


def read_heldout(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> HeldOut:
    """The held-out prompts, text and questions; what was trained on and too long prompts are dropped and counted."""
    cfg, data = recipe.evaluate, recipe.data
    fitting = fit_prompts(unseen_prompts(recipe, drops), tokenizer, data.max_prompt_tokens, drops)
    fitting = fitting[: cfg.prompts or None]
    if not fitting:
        raise UserError(
            "there is no held-out prompt to evaluate on",
            where="data.prompts_heldout",
            fix="name a file with prompts that the other stages do not use, or raise data.max_prompt_tokens",
        )
    cloze = read_cloze(data.cloze) if data.cloze else []
    texts = unseen_texts(recipe, drops)
    rows = [(encoded, s) for encoded in fitting for s in range(cfg.samples_per_prompt)]
    return HeldOut(
        prompts=[encoded.item for encoded in fitting],
        ids=[encoded.prompt for encoded, _ in rows],
        seeds=[row_seed(recipe.run.seed, "evaluate", encoded.item.key, s) for encoded, s in rows],
        # Rows as long as those of the ptx loss, so that this loss and ppo/ptx_loss are on one scale.
        text_rows=token_blocks(texts, tokenizer, recipe.ppo.ptx_tokens),
        cloze=cloze[: cfg.cloze_questions or None],
    )
