"""The held-out prompts, text and questions that evaluate puts to every policy; what training has seen is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """The inputs of every policy. Each encoded prompt has `samples_per_prompt` consecutive rows."""

    prompts: list[Prompt]
    ids: list[list[int]]  # token ids of the prompt of each row
    seeds: list[int]  # one for each row, the same for every policy
    text_rows: list[list[int]] = field(default_factory=list)  # token ids of held-out pretraining text
    cloze: list[Cloze] = field(default_factory=list)

    @property
    def samples_per_prompt(self) -> int:
        """Return how many consecutive rows a prompt has."""
        return len(self.ids) // len(self.prompts)

    @property
    def row_prompts(self) -> list[Prompt]:
        """Return the prompt of each row."""
        return [prompt for prompt in self.prompts for _ in range(self.samples_per_prompt)]


def unseen_prompts(recipe: Recipe, drops: Drops) -> list[Prompt]:
    """Return the held-out prompts that no training stage has seen; the others are counted in `drops`."""
    data, uncounted = recipe.data, Drops()  # the other stages count the drops of the training files
    seen = {row.key for row in read_prompts(data.prompts, uncounted)} if data.prompts else set()
    seen |= {row.prompt.key for row in read_demonstrations(data.demonstrations, uncounted)}
    seen |= {row.prompt.key for row in read_rankings(data.rankings, uncounted)} if data.rankings else set()
    prompts = read_prompts(data.prompts_heldout, drops)
    kept = [prompt for prompt in prompts if prompt.key not in seen]
    if len(kept) < len(prompts):
        drops.add("held-out prompt that is also in the training data", len(prompts) - len(kept))
    return kept


def unseen_texts(recipe: Recipe, drops: Drops) -> list[str]:
    """Return the held-out texts that are not trained on; the others are counted in `drops`."""
    data = recipe.data
    seen = set(read_texts(data.pretraining, Drops())) if data.pretraining else set()
    texts = read_texts(data.pretraining_heldout, drops) if data.pretraining_heldout else []
    kept = [text for text in texts if text not in seen]
    if len(kept) < len(texts):
        drops.add("held-out text that is also in the training data", len(texts) - len(kept))
    return kept


def read_heldout(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> HeldOut:
    """Read and encode the held-out data, dropping and counting what is unfit; raise UserError if no prompt is left."""
    cfg, data = recipe.evaluate, recipe.data
    fitting = fit_prompts(unseen_prompts(recipe, drops), tokenizer, data.max_prompt_tokens, drops)
    fitting = fitting[: cfg.prompts or None]
    if not fitting:
        fix = "name a file with prompts that the other stages do not use, or raise data.max_prompt_tokens"
        raise UserError("there is no held-out prompt to evaluate on", "data.prompts_heldout", fix)
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
