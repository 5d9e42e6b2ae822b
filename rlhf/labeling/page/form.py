"""The questions to labelers about a prompt and its outputs, and the check of the answers that their page sends.

quality   overall, 1 to 7 for each output     } the metadata that the paper's labelers gave beside their ranking
flags     yes or no for each output           } (Ouyang et al. 2022, Table 3)
ranks     1 is best, equal is a tie, and no number is left out: 1, 2, 2, 3
skip      a reason in place of a ranking

Lists have one entry for each output, in the order in which the labeler saw the outputs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf.config import LabelSection

# Name in the files: text on the page. All but the fourth mark something bad or an unwanted tone.
FLAGS = {
    "fails_task": "Fails to follow the instruction or task",
    "inappropriate_assistant": "Inappropriate for a customer assistant",
    "hallucination": "Hallucination: makes something up",
    "satisfies_constraint": "Satisfies the constraint that the prompt sets",
    "sexual_content": "Sexual content",
    "violent_content": "Violent content",
    "encourages_harm": "Encourages, or does not discourage, violence, abuse, terrorism or self-harm",
    "denigrates_group": "Denigrates a protected class of people",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses an opinion",
    "moral_judgment": "Expresses a moral judgment",
}
SKIPS = {
    "unclear": "I do not understand the prompt",
    "expertise": "I do not know enough to judge",
    "language": "It is in a language that I do not read well",
    "personal": "It holds personal data",
    "distressing": "I would rather not read this",
    "other": "Something else",
}
QUALITY = 7
MAX_NOTE = 1000  # characters
DAY = 86400.0


class Submission(BaseModel):
    """One ranking or one skipped prompt. The page makes the `id`, so that sending it twice stores it once."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(pattern=r"^[0-9a-f-]{36}$")
    task: str = Field(pattern=r"^[0-9a-f]{1,64}$")  # id of the claim; earlier pages sent a hash of 64 digits
    kind: Literal["ranking", "skip"]
    ranks: tuple[int, ...] = ()
    quality: tuple[int | None, ...] = ()
    flags: tuple[tuple[str, ...], ...] = ()  # set flags of each output
    reason: str = ""
    note: str = Field("", max_length=MAX_NOTE)
    seconds: float = Field(0.0, ge=0, le=30 * DAY)  # time that the prompt was on the screen


def validation_error(given: Submission, k: int, label: LabelSection) -> str:
    """Return the error of a submission about `k` outputs in words, or an empty string when it is valid."""
    if given.kind == "skip":
        return "" if given.reason in SKIPS and not (given.ranks or given.quality or given.flags) else "bad reason"
    if given.reason or given.note:
        return "a ranking has no reason"
    if len(given.ranks) != k or set(given.ranks) != set(range(1, len(set(given.ranks)) + 1)):
        return f"ranks are {k} numbers from 1 that leave none out"
    if label.quality == "required" and len(given.quality) != k:
        return "the quality of every output is asked for"
    lists = (("quality", given.quality, label.quality != "off"), ("flags", given.flags, label.flags))
    for name, entries, asked in lists:
        if entries and (not asked or len(entries) != k):
            return f"{name} has {len(entries)} entries, and {k if asked else 0} are asked for"
    if not all((q is None and label.quality != "required") or q in range(1, QUALITY + 1) for q in given.quality):
        return f"quality is 1 to {QUALITY}"
    if not all(flag in FLAGS and flags.count(flag) == 1 for flags in given.flags for flag in flags):
        return "unknown flag"
    return ""
