"""Make stores of labels with prompts and labelers in them, and answer as a labeler."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from rlhf.config import LabelSection
from rlhf.data.records import Prompt
from rlhf.labeling.outputs import Outputs
from rlhf.labeling.page.form import Submission
from rlhf.labeling.page.store import LabelStore


def outputs(n: int, k: int = 3, text: str = "output") -> list[Outputs]:
    """Return n prompts with k outputs each, which begin with `text`."""
    texts = [tuple(f"{text} {j} of {i}" for j in range(k)) for i in range(n)]
    return [Outputs(Prompt.from_text(f"prompt {i}"), each, (True,) * k) for i, each in enumerate(texts)]


def opened(path: Path, n: int = 4, names: tuple[str, ...] = ("anna",), seed: int = 1, **label: Any) -> LabelStore:
    """Return a store with n prompts, or with the outputs `items` where they are given, and these labelers."""
    items = label.pop("items", None) or outputs(n)
    store = LabelStore(path / "labels.sqlite", LabelSection(**label), seed)
    store.set_tasks(items)
    store.invite(names)
    return store


def ranking(task: str, ranks: list[int], **more: Any) -> Submission:
    """Return a labeler's ranking of a prompt, with an id of its own."""
    return Submission(id=str(uuid.uuid4()), task=task, kind="ranking", ranks=ranks, **more)


def skip(task: str, reason: str = "unclear") -> Submission:
    """Return a labeler's refusal to rank a prompt, with an id of its own."""
    return Submission(id=str(uuid.uuid4()), task=task, kind="skip", reason=reason)


def rank_one(store: LabelStore, labeler: str) -> Submission | None:
    """Rank the labeler's next prompt in the order of its outputs; return None when there is no next one."""
    task = store.next_task(labeler)
    if task is None:
        return None
    given = ranking(task.id, list(range(1, len(task.outputs) + 1)))
    store.submit(labeler, given)
    return given
