"""Names of models: revisions of the Hub's repositories, and what is no name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_tokenizer, new_reward_model, save_model
from rlhf.models.peft.folder import find_adapter
from rlhf.models.peft.methods import add_adapter
from rlhf.models.resolve import hub_revision, resolve_model
from rlhf.recipe import load_recipe
from rlhf.run.fingerprints import fingerprint

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the Hub's cache a repository whose `main` and `v1` have other weights, as its client lays them out."""
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for i, (ref, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / ref).write_text(commit)
        folder = repository / "snapshots" / commit
        shutil.copytree(tiny_dir, folder)
        policy = load_policy(tiny_dir, ModelSection(name="tiny"))
        with torch.no_grad():
            policy.model.norm.weight.fill_(1.0 + i)
        save_model(policy, load_tokenizer(tiny_dir), folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_revision_is_the_state_that_is_loaded(hub: Path, tmp_path: Path) -> None:
    for name, expected in (("owner/name", 1.0), ("owner/name@v1", 2.0), (f"owner/name@{COMMITS['v1']}", 2.0)):
        section = ModelSection(name=name)
        policy = load_policy(name, section)
        assert float(policy.model.norm.weight.detach()[0]) == expected
        assert float(new_reward_model(name, section).model.norm.weight.detach()[0]) == expected
        assert len(load_tokenizer(name, section)) == 1024
    with pytest.raises(UserError, match="could not be loaded"):
        load_policy("owner/name@v2", ModelSection(name="owner/name@v2"))

    # An adapter knows the revision of its base, here and in peft's own file.
    section = ModelSection(name="owner/name@v1")
    adapted = add_adapter(load_policy(section.name, section), PeftSection(method="lora"))
    save_model(adapted, load_tokenizer(section.name, section), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")
    adapter = find_adapter(tmp_path / "adapter")
    assert adapter is not None and adapter.base.name == "owner/name@v1"
    assert float(load_policy(tmp_path / "adapter", ModelSection(name="tiny")).model.norm.weight.detach()[0]) == 2.0


def test_a_revision_is_part_of_the_fingerprint() -> None:
    prints = {fingerprint(load_recipe("tiny", [f"model.name={name}"]), "sft") for name in ("o/n", "o/n@v1", "o/n@v2")}
    assert len(prints) == 3


def test_only_a_hub_name_has_a_revision(tmp_path: Path) -> None:
    assert hub_revision("owner/name@refs/pr/3") == ("owner/name", "refs/pr/3")
    assert hub_revision("owner/name") == ("owner/name", None)
    assert resolve_model("owner/name@refs/pr/3") == "owner/name@refs/pr/3"
    folder = tmp_path / "me@home"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(folder) == str(folder) and hub_revision(str(folder)) == (str(folder), None)
    with pytest.raises(UserError, match="no such model folder"):
        resolve_model("a/b/c@v1")
