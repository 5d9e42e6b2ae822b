"""A minibatch of PPO, cut into the micro-batches that go through the networks, and the means of its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.rollout.batches import SequenceBatch, build_batch
from rlhf.rollout.experience import Experience
from rlhf.system.distributed import all_gather_tensor, shard


@dataclass(frozen=True)
class MicroBatch:
    """Episodes that go through the networks at once, on their device: b rows, r response positions."""

    sequences: SequenceBatch
    mask: Tensor  # [b, r] bool
    logprobs: Tensor  # [b, r] log pi_old(a_t | s_t)
    values: Tensor  # [b, r] V_old(s_t)
    advantages: Tensor  # [b, r]
    returns: Tensor  # [b, r]

    def unflatten(self, flat: Tensor) -> Tensor:
        """Return flat values [N] of the response tokens as [b, r], zero on padding (differentiable)."""
        return self.sequences.unflatten(flat, self.mask.shape[1])


def micro_batches(
    experience: Experience, minibatch: Sequence[int], size: int, pad_id: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield this process's share of a minibatch, at most `size` episodes at a time.

    Episodes of like length share a micro-batch, so that little is spent on padding.
    """
    mine = shard(sorted(minibatch, key=lambda i: sum(map(len, experience.pairs[i]))))
    for first in range(0, len(mine), size):
        rows = mine[first : first + size]
        width = int(experience.mask[rows].sum(1).max())
        names = ("mask", "logprobs", "values", "advantages", "returns")
        yield MicroBatch(
            build_batch([experience.pairs[i] for i in rows], pad_id).to(device),
            **{name: getattr(experience, name)[rows][:, :width].to(device) for name in names},
        )


class TokenMeans:
    """Accumulates the metrics of a minibatch over micro-batches and processes.

    Sums stay on the device, in float64, so that no micro-batch waits for the device. `reduce` reads all at once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add sums over the tokens of a micro-batch, scalars by the name of the metric."""
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_max(self, values: Mapping[str, Tensor]) -> None:
        """Keep the maximum of each metric over the micro-batches, scalars by name."""
        for name, value in values.items():
            value = value.detach().double()
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def reduce(self, tokens: int) -> dict[str, float]:
        """Return the sums of all processes divided by `tokens`, and the maxima, by name.

        It takes one gather of one tensor. All processes must call it, and have added the same names.
        """
        rows = all_gather_tensor(torch.stack([*self._sums.values(), *self._maxima.values()]))
        count = len(self._sums)
        means, maxima = rows[:, :count].sum(0) / tokens, rows[:, count:].amax(0)
        return dict(zip([*self._sums, *self._maxima], [*means.tolist(), *maxima.tolist()], strict=True))
