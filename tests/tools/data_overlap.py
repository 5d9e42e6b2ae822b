"""What two texts of the embedded data share: runs of words, and the words that say what a prompt is about."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

NGRAM = 13  # words; the length at which GPT-3's authors called two texts contaminated
COMMON = frozenset(
    "the and for with what whats between difference write one two three sentence short".split()  # noqa: SIM905
)
NEAR = 0.6  # Jaccard similarity from which two prompts count as one


@dataclass(frozen=True)
class Text:
    """One text and where it stands."""

    file: str
    line: int
    field: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}.jsonl, line {self.line}, field `{self.field}`"


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: what two texts must share to count as copied."""
    return re.findall(r"\w+(?:'\w+)*", unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower())


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """The text's runs of n words; a shorter text of at least five words is one run."""
    w = words(text)
    if 5 <= len(w) < n:
        return {tuple(w)}
    return {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}


def overlaps(texts: Sequence[Text]) -> list[tuple[Text, Text, str]]:
    """Pairs of texts of different rows that share a run of 13 words (or are the same short text), once a pair."""
    holders: dict[tuple[str, ...], list[Text]] = defaultdict(list)
    for text in texts:
        for gram in ngrams(text.text):
            holders[gram].append(text)
    found: dict[tuple[Text, Text], str] = {}
    for gram, group in holders.items():
        for a, b in combinations(group, 2):
            if (a.file, a.line) != (b.file, b.line):
                found.setdefault((a, b), " ".join(gram))
    return [(a, b, gram) for (a, b), gram in found.items()]


def content(w: Sequence[str]) -> set[str]:
    """Beginnings of the words that say what a prompt is about: misspelt and inflected ones are mostly the same."""
    return {word[:5] for word in w if len(word) > 2 and word not in COMMON}


def similar(a: set[Any], b: set[Any]) -> bool:
    """Whether two sets, neither of them empty, share most of what they have."""
    return bool(a and b) and len(a & b) >= NEAR * len(a | b)
