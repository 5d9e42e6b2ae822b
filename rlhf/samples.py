"""What the rank stage has sampled, kept as it comes: rank/samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.encoding import Encoded
from rlhf.data.records import Prompt, write_jsonl
from rlhf.system.distributed import is_main_process
from rlhf.system.row_log import append_rows, whole_rows


class Samples:
    """rank/samples.jsonl: one row per prompt, appended chunk by chunk; rows of another policy or setting are left out.

    Args:
        fingerprint: of everything that the samples depend on besides the prompt.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        known = whole_rows(path, ("key", "fingerprint"), "its chunk is sampled again")
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in known if row["fingerprint"] == fingerprint}
        if is_main_process():
            write_jsonl(path, list(self.rows.values()))

    def tokens(self, prompts: Sequence[Encoded[Prompt]]) -> int:
        """Tokens sampled for these prompts."""
        return sum(sum(self.rows[encoded.item.key]["lengths"]) for encoded in prompts)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and wait until they are on disk; the first process writes for all."""
        whole = [row | {"fingerprint": self.fingerprint} for row in rows]
        self.rows |= {row["key"]: row for row in whole}
        if is_main_process():
            append_rows(self.path, whole)
