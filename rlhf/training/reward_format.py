"""Give a reward model that reads another format than the policy writes the text of the policy's episodes.

A reward model that the run trains reads the policy's own token ids. One off the shelf (reward.train=false) may have
another tokenizer or another chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.models.tokenizer import load_tokenizer, same_tokenizer
from rlhf.rollout.batches import Pair
from rlhf.rollout.sampling import Rollout


@dataclass(frozen=True)
class OwnFormat:
    """What turns episodes into the token ids of a reward model with a format of its own."""

    tokenizer: PreTrainedTokenizerBase  # the reward model's
    policy_tokenizer: PreTrainedTokenizerBase
    prompts: dict[tuple[int, ...], list[int]]  # a prompt's ids in the reward model's format, by those in the policy's

    def pairs(self, rollout: Rollout) -> list[Pair]:
        """Return prompt and response of each episode; what is finished ends with the reward model's end of a turn."""
        rows = zip(rollout.pairs(), rollout.texts(self.policy_tokenizer), rollout.finished.tolist(), strict=True)
        return [
            (self.prompts[tuple(prompt)], encode_response(self.tokenizer, text, finished))
            for (prompt, _), text, finished in rows
        ]


def reward_pairs(rollout: Rollout, own: OwnFormat | None) -> list[Pair]:
    """Return the episodes as the reward model reads them: as they were sampled, unless it has a format of its own."""
    return own.pairs(rollout) if own else rollout.ended_pairs()


def own_format(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    reward_dir: Path,
    prompts: Iterable[tuple[Prompt, Sequence[int]]],
) -> OwnFormat | None:
    """Return how a reward model with another format than the policy's is asked; None if the formats are the same.

    `prompts` are those that it will be asked about, with their ids in the policy's format. Raises UserError if the
    tokenizers differ although the run has trained the reward model.
    """
    theirs = load_tokenizer(reward_dir, recipe.reward_format)
    if recipe.reward.train:
        same_tokenizer(tokenizer, theirs)
        return None
    if reads_alike(tokenizer, theirs):
        return None
    encoded = {tuple(ids): encode_prompt(theirs, prompt) for prompt, ids in prompts}
    return OwnFormat(theirs, tokenizer, encoded)


def reads_alike(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers make the same ids of every dialogue."""
    try:
        same_tokenizer(a, b)
    except UserError:
        return False
    return a.chat_template == b.chat_template
