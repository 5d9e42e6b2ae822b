"""Probe texts with their scores, stored beside a reward model and checked whenever it is loaded.

If a reward or value head is lost on the way (a known defect of many systems), these scores change, and the run stops
before PPO instead of optimising noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.rollout.batches import Pair
from rlhf.rollout.scoring import scores
from rlhf.system.ranks import is_main_process

FILE = "probes.json"
# Of a normalised score: float32 reloads agree to 1e-5, and a bfloat16 model of 30 layers is up to some 0.05 off.
TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.1}


def write_probes(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], folder: Path) -> None:
    """Score the pairs (prompt ids, response ids) and write them to folder/probes.json."""
    rows = [
        {
            "prompt": tokenizer.decode(list(prompt)),
            "response": tokenizer.decode(list(response)),
            "prompt_ids": list(prompt),
            "response_ids": list(response),
            "score": float(score),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        for (prompt, response), score in zip(pairs, scores(model, pairs), strict=True)
    ]
    if is_main_process():
        (folder / FILE).write_text(json.dumps(rows, indent=1))


def check_probes(model: nn.Module, folder: Path) -> None:
    """Score the stored probes again; raise UserError if there are none, or a score differs by more than TOLERANCE.

    That is the larger one of the type that the model was saved in and the type that it has now.
    """
    path = folder / FILE
    if not path.exists():
        what = "the reward model has no stored probe scores, so nothing shows that its head was loaded"
        raise UserError(what, str(path), "train it with the reward stage, which writes them")
    rows = json.loads(path.read_text())
    again = scores(model, [(row["prompt_ids"], row["response_ids"]) for row in rows])
    for row, score in zip(rows, again.tolist(), strict=True):
        types = {model.dtype, getattr(torch, row.get("dtype", "float32"))}
        if not abs(score - row["score"]) <= max(TOLERANCE[each] for each in types):
            what = f"the reward model scores a stored probe {score:.4f}; when it was saved it scored {row['score']:.4f}"
            fix = "weights or head in this folder are not those that were trained: run the reward stage again"
            raise UserError(what, str(path), fix)
