"""What the rank stage has sampled, kept as it comes: rank/samples.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.progress import console, is_main_process
from rlhf.prompting import Encoded
from rlhf.records import Prompt, write_jsonl


class Samples:
    """rank/samples.jsonl: one row per prompt, appended chunk by chunk; rows of another policy or setting are left out.

    Args:
        fingerprint: of everything that the samples depend on besides the prompt.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in filter(None, path.read_bytes().split(b"\n")):
                try:
                    row = json.loads(line)
                except ValueError:
                    console.print(f"{path.name}: a line was cut off by an interruption; its chunk is sampled again")
                    continue
                if row["fingerprint"] == fingerprint:
                    self.rows[row["key"]] = row
        if is_main_process():
            write_jsonl(path, list(self.rows.values()))

    def tokens(self, prompts: Sequence[Encoded[Prompt]]) -> int:
        """Tokens sampled for these prompts."""
        return sum(sum(self.rows[encoded.item.key]["lengths"]) for encoded in prompts)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and wait until they are on disk; the first process writes for all."""
        whole = [row | {"fingerprint": self.fingerprint} for row in rows]
        self.rows |= {row["key"]: row for row in whole}
        if not is_main_process():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in whole)
            file.flush()
            os.fsync(file.fileno())
