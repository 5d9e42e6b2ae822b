"""Fixtures that every test file shares: the tiny models, a cache folder of the session, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)  # xdist sets it to 80, where output that is no terminal is wider
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: two workers share the cores
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.model_config import ModelSection
from rlhf.models import loading, tiny

torch.set_num_threads(1)
pytest.register_assert_rewrite("support")  # before the first import of it: its asserts then show their values


# The files that take longest, in that order: begun first, so that the workers of `make test` end together.
LONGEST = (
    "test_readme",
    "test_peft_stages",
    "test_compare",
    "test_run",
    "test_server",
    "test_redo",
    "test_stage_memory",
    "test_page",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; the order within a file stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Set RLHF_CACHE to a folder of this session, which its workers share, unless the caller set one."""
    if own := os.environ.get("RLHF_CACHE"):
        yield Path(own)
        return
    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["RLHF_CACHE"] = str(folder)
    yield folder
    del os.environ["RLHF_CACHE"]


@pytest.fixture(scope="session")
def tiny_dir(cache_folder: Path) -> str:
    """Folder of the tiny Llama with its tokenizer; read only."""
    return loading.resolve_model("tiny")


@pytest.fixture(scope="session")
def tiny_policy_dir(tiny_dir: str) -> str:
    """The same folder under the name that stage tests use."""
    return tiny_dir


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny GPT-2 (absolute positions, biases) with the same tokenizer; read only."""
    return str(tiny.tiny_gpt2_dir(tmp_path_factory.mktemp("tiny_gpt2")))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_dir: str) -> PreTrainedTokenizerBase:
    """Tokenizer of both tiny models; read only."""
    return loading.load_tokenizer(tiny_dir)


@pytest.fixture
def tiny_policy(tiny_dir: str) -> PreTrainedModel:
    """A fresh tiny Llama that the test may change."""
    return loading.load_policy(tiny_dir, ModelSection(name="tiny"))


@pytest.fixture
def tiny_gpt2(tiny_gpt2_dir: str) -> PreTrainedModel:
    """A fresh tiny GPT-2 that the test may change."""
    return loading.load_policy(tiny_gpt2_dir, ModelSection(name="tiny"))


@pytest.fixture
def stage_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test as a single process in a new folder, with the data files that RECIPE of stage_runs.py names."""
    from support.stage_runs import DATA

    monkeypatch.chdir(tmp_path)
    for name in DATA:
        Path(f"{name}.jsonl").write_text('{"text": "never read here"}\n')
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
