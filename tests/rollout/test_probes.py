"""Probes of a reward model: its type may change from saving to loading, and its head may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_reward_model, load_tokenizer, new_reward_model, save_model
from rlhf.rollout.probes import check_probes, write_probes

PAIRS = [([5, 6, 7], [8, 9, 2]), ([10], [11, 12, 13, 14, 2]), ([15, 16, 17], [20])]


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
def test_a_reward_model_of_one_type_loads_in_another(tiny_dir: str, tmp_path: Path, saved: str, loaded: str) -> None:
    torch.manual_seed(0)
    model = new_reward_model(tiny_dir, ModelSection(name="tiny", dtype=saved))
    with torch.no_grad():
        model.score.weight.normal_(std=0.5)
    tokenizer, folder = load_tokenizer(tiny_dir), tmp_path / "model"
    save_model(model, tokenizer, folder)
    write_probes(model, tokenizer, PAIRS, folder)
    again = load_reward_model(folder, ModelSection(name="tiny", dtype=loaded))
    assert again.dtype == getattr(torch, loaded)
    check_probes(again, folder)
    with torch.no_grad():
        again.score.weight.normal_(std=0.5)
    with pytest.raises(UserError, match="are not those that were trained"):
        check_probes(again, folder)
