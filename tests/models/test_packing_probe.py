"""The probe of packing: what it feeds a model, what it cuts, and its verdicts on architectures of published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.model_config import ModelSection
from rlhf.models.packing_probe import keeps_documents_apart, packed_row, small_configs

SDPA, EAGER = ModelSection(), ModelSection(attention="eager")


def test_a_packed_row_is_what_trls_collator_makes() -> None:
    documents = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]]), torch.tensor([[10, 11, 12, 13]])]
    row = {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13], "seq_lengths": [3, 2, 4]}
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    ours = packed_row(documents)
    assert theirs.keys() - {"labels"} == ours.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name


@pytest.mark.parametrize(
    ("config", "model", "apart"),
    [
        (LlamaConfig(), SDPA, True),
        (LlamaConfig(num_key_value_heads=8, attention_bias=True), EAGER, True),
        (GPT2Config(), SDPA, True),
        (Gemma3TextConfig(), SDPA, True),
        (Qwen3MoeConfig(), SDPA, True),
        (OPTConfig(), SDPA, False),
        (OPTConfig(), EAGER, False),
        (BloomConfig(), EAGER, False),
        (FalconConfig(), SDPA, False),
        (LlamaConfig(), ModelSection(attention="flash_attention_2"), None),
    ],
    ids=lambda value: getattr(value, "model_type", getattr(value, "attention", str(value))),
)
def test_verdicts(config: PretrainedConfig, model: ModelSection, apart: bool | None) -> None:
    before: dict[str, Any] = config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert keeps_documents_apart(config, model) is apart
    assert torch.equal(torch.rand(1), expected)
    assert config.to_dict() == before


def test_a_layer_of_every_kind_is_kept_and_the_width_of_a_head() -> None:
    gemma = Gemma3TextConfig(num_hidden_layers=12, head_dim=32)  # five sliding layers, then a full one
    small = next(small_configs(gemma))
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.num_hidden_layers == 2
    assert (small.num_attention_heads, small.head_dim) == (4, 32)
    neo = next(small_configs(GPTNeoConfig()))
    assert neo.attention_layers == ["global", "local"] and neo.num_layers == 2
    llama = next(small_configs(LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)))
    assert (llama.num_hidden_layers, llama.hidden_size, llama.num_key_value_heads) == (2, 4 * 128, 2)
