"""A batch of rankings cut into passes of bounded size, so that memory does not grow with K.

Prompts of like length go through the model together, as many as `reward.micro_tokens` holds. The loss of a prompt
joins all its outputs; one whose outputs are too many for a pass is done in two rounds, with the same gradient but for
rounding: without gradients all outputs are scored, which gives the loss and its slope at each score; then parts of the
outputs go through again, each backward from score x slope. That is exact because dropout is off, and such prompts
alone cost the extra forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.functional.ranking import TieHandling, ranking_loss
from rlhf.rollout.batches import Pair, token_budget_batches
from rlhf.system.distributed import gather_shards, shard


@dataclass
class Group:
    """One prompt with its K ranked outputs, as token ids."""

    pairs: list[Pair]
    ranks: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each output with its prompt."""
        return [len(p) + len(r) for p, r in self.pairs]

    def fits_one_pass(self, tokens: int) -> bool:
        """Whether its outputs, at the length of the longest, are a pass."""
        return len(self.pairs) * max(self.lengths) <= tokens


@dataclass
class Pass:
    """Outputs that go through the model together: whole groups, or a part of one group and the loss's slopes there."""

    pairs: list[Pair]
    groups: Sequence[Group] = ()
    score_grads: Tensor | None = None

    def loss(self, scores: Tensor, ties: TieHandling) -> Tensor:
        """What to go backward from: the loss of whole groups, or of a part what has the gradient of its share."""
        if self.score_grads is None:
            return ranking_loss(scores, [g.ranks for g in self.groups], ties).loss
        return (scores * self.score_grads.to(scores.device)).sum()


def by_length(groups: Sequence[Group]) -> list[Group]:
    """Shortest first: neighbours make passes with little padding, and every n-th is a fair share."""
    return sorted(groups, key=lambda g: max(g.lengths))


def whole_passes(groups: Sequence[Group], tokens: int) -> list[Pass]:
    """Groups that fit, in their order, as few passes as the budget allows when sorted."""
    passes: list[list[Group]] = []
    rows = longest = 0
    for group in groups:
        rows, longest = rows + len(group.pairs), max(longest, *group.lengths)
        if not passes or rows * longest > tokens:
            passes.append([])
            rows, longest = len(group.pairs), max(group.lengths)
        passes[-1].append(group)
    return [Pass([pair for g in part for pair in g.pairs], part) for part in passes]


def split_passes(
    groups: Sequence[Group], tokens: int, ties: TieHandling, score: Callable[[list[list[Pair]]], list[list[float]]]
) -> tuple[list[Pass], list[list[float]], float]:
    """The first round for groups that do not fit; several processes share it out, and all must call.

    Args:
        score: raw scores of this process's parts, without gradients; not called when all groups fit.

    Returns:
        the passes of the second round (of all processes: each takes its own), the scores of every group, and the sum
        of the groups' losses.
    """
    if not groups:
        return [], [], 0.0
    parts = [(i, part) for i, g in enumerate(groups) for part in token_budget_batches(g.lengths, tokens)]
    scored = gather_shards(score([[groups[i].pairs[k] for k in part] for i, part in shard(parts)]))
    passes, found, total = [], [[0.0] * len(g.pairs) for g in groups], 0.0
    for (i, part), values in zip(parts, scored, strict=True):
        for k, value in zip(part, values, strict=True):
            found[i][k] = value
    score_grads = []
    for group, values in zip(groups, found, strict=True):
        leaf = torch.tensor(values, requires_grad=True)
        loss = ranking_loss(leaf, [group.ranks], ties).loss
        score_grads.append(torch.autograd.grad(loss, leaf)[0])
        total += float(loss.detach())
    for i, part in parts:
        passes.append(Pass([groups[i].pairs[k] for k in part], score_grads=score_grads[i][part]))
    return passes, found, total
