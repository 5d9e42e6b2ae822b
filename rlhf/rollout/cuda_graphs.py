"""Decoding whose steps all have one shape, so that a GPU replays each from a CUDA graph: one call for all its kernels.

What changes from step to step lies in tensors: the tokens, their positions, the column of the cache that is written,
and a mask over the whole cache that opens column by column. Rows that have ended stay, and go on unread, until they are
half of all; then the others move together and a new graph is made. The graph reads the training weights where they are:
nothing is copied or synchronised.

Off a GPU the same steps run one by one, which is how they are tested. The replay itself has never run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.rollout.decoding import LlamaDecoding
from rlhf.rollout.kv_cache import compaction
from rlhf.rollout.llama_forward import KeysValues


class GraphDecoding(LlamaDecoding):
    """As InferenceDecoding, to rounding; a step costs attention over the whole room and the rows that have ended."""

    def prefill(self, prompts: list[list[int]], prompt_of_row: Tensor, pad_id: int) -> Tensor:
        """Logits [B, V] of the first token; row i continues prompt copies[i] of `prompts`."""
        logits = super().prefill(prompts, prompt_of_row, pad_id)
        self.mask[..., self.end :] = -torch.inf
        self._settle()
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one token [B] more in each row."""
        self.tokens[self.places] = tokens
        self._run()
        self.end += 1
        return self.logits[self.places]

    def drop_finished(self, unfinished: list[bool]) -> Tensor:
        """Let the rows that are not `unfinished` leave; returns the row [B] that is in each place afterwards."""
        order = torch.tensor(compaction(unfinished)[2], device=self.device)
        self.places = self.places[order]
        if 2 * len(self.places) <= len(self.tokens):
            self.buffers = [KeysValues(*(held[self.places] for held in layer)) for layer in self.buffers]
            self.positions, self.mask = self.positions[self.places], self.mask[self.places]
            self._settle()
        return order

    def _settle(self) -> None:
        """The rows that are here now are those of every step to come."""
        rows = len(self.positions)
        self.column = torch.tensor([self.end], device=self.device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.places = torch.arange(rows, device=self.device)  # [B] of the rows that go on
        self.warm, self.graph = False, None

    def _run(self) -> None:
        if self.device.type != "cuda":
            self._advance()
        elif self.graph is not None:
            self.graph.replay()
        elif self.warm:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records and does not run
                self._advance()
            self.graph.replay()
        else:
            # The first step of a shape makes what libraries make once, on a stream of its own as capturing asks for.
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self._advance()
            main.wait_stream(side)
            self.warm = True

    def _advance(self) -> None:
        """One step, from and to the same tensors."""
        self.mask.index_fill_(3, self.column, 0.0)
        hidden = self.model.step(self.tokens, self.positions, self.buffers, self.column, self.mask)
        self.logits = self._logits(hidden, len(self.tokens))
        self.positions.add_(1)
        self.column.add_(1)

    def _preallocated(self, held: Tensor, prompt_of_row: Tensor) -> Tensor:
        # Zeros, for what is masked is still multiplied: by a weight of 0, which makes no number of a nan.
        buffers = super()._preallocated(held, prompt_of_row)
        buffers[:, :, self.end :] = 0
        return buffers
