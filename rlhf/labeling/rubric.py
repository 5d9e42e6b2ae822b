"""The simulated labeler's rubric: a deterministic score in [0, 1] of one response to one prompt.

It replaces a person who checks what the paper's labelers were asked to check: whether the answer addresses the request,
is complete, says each thing once, and is as short as it can be. It knows nothing about facts.

| criterion      | weight | scores 1 for                                          | because                           |
|----------------|--------|-------------------------------------------------------|-----------------------------------|
| complete       | 0.35   | EOS at the end; a text that reads as ended: half each | small models ramble until cut off |
| on_topic       | 0.25   | a third of the request's content words (three at      | answers to something else occur   |
|                |        | most), in language, not as a bag of words             |                                   |
| not_repetitive | 0.20   | no trigram or sentence twice, nothing copied from the | models loop and echo the prompt   |
|                |        | prompt: 1 - the largest of four shares                |                                   |
| concise        | 0.15   | 4 to 45 words; 0 for no words and from 90 words on    | no shrug and no essay helps       |
| clean          | 0.05   | no role names, control tokens or junk characters      | some text leaks the format        |

Details, so that the score can be worked out by hand:
- The text reads as ended when its last character is terminal punctuation, a closing quote or a bracket. A text that
  ended with EOS may instead stop at a list item, or at a last line of at most 8 words whose last word is not a
  function word (a name, a label, a line of verse).
- Content words are the words of the last user turn without function words and words of instruction ("write", "list",
  "short"). Two words are one when they are equal up to a plural s, or share a beginning of at least four letters that
  is at most two letters shorter than the shorter word. In a response of more than 6 words, at least one word in eight
  should be a function word; with fewer on_topic shrinks in proportion.
- The four shares: repeated word trigrams; repeated sentences; runs of 6 words (fewer in a short prompt, at least 3) of
  the prompt; and, from 4 words on, content words of the prompt, where a share of 0.75 counts 0, a share of 1 counts 1,
  and shares between them count linearly.

A response without any word scores 0, on every criterion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WEIGHTS = {"complete": 0.35, "on_topic": 0.25, "not_repetitive": 0.20, "concise": 0.15, "clean": 0.05}

_FUNCTION = """
    a about after again all also am an and any are as at be because been before being both but by can could did do
    does doing don't for from get got had has have having he her here him his how i i'm i've if in into is isn't it it's
    its just let me might more most my no nor not of off on once one only or other our out over own per she should so
    some such than that that's the their them then there these they this those through to too under until up us very was
    we were what what's when where which while who whom whose why will with would you you're your yours"""
_INSTRUCTION = """
    answer brainstorm briefly classify compose create describe draft explain extract few find fix following generate
    give help idea invent kindly line list make max maximum need paragraph please plz pls produce provide question
    reply rephrase rewrite sentence short show suggest summarise summarize tell text thank turn two three four five ten
    use want word write"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())
INSTRUCTION_WORDS = frozenset(_INSTRUCTION.split())

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u2026]+(?=\s|$)|\n+")
_LIST_ITEM = re.compile(r"\s*(?:[-*\u2022]|\d+[.)])\s+\S")
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant|User|System):\s*")
_LEFTOVER = re.compile(r"\b(?:Human|Assistant|User|System):|<\||\|>|\[/?INST\]")
_JUNK_RUN = re.compile(r"([^\w\s])\1{4,}|(\w)\2{6,}")
_ENDINGS = ".!?\u2026\"'\u201d\u2019)]}\u00bb`"
_TYPOGRAPHY = "\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u2022\u00b0\u00a3\u20ac\u00d7\u00f7\u00bd"


def rubric_score(prompt: str, response: str, finished: bool) -> float:
    """Return the weighted sum of the criteria, in [0, 1]; the response has no special tokens, EOS made it `finished`.

    The prompt is a request, or a transcript "Human: ..\\n\\nAssistant: ..\\n\\nHuman: ..\\n\\nAssistant:".
    """
    values = criteria(prompt, response, finished)
    return sum(weight * values[name] for name, weight in WEIGHTS.items())


def criteria(prompt: str, response: str, finished: bool) -> dict[str, float]:
    """Return the value of each criterion of the module's table, in [0, 1]."""
    said = words(response)
    if not said:
        return dict.fromkeys(WEIGHTS, 0.0)
    return {
        "complete": (float(finished) + float(reads_as_ended(response, finished))) / 2,
        "on_topic": _on_topic(content_words(last_user_turn(prompt)), said),
        "not_repetitive": 1.0
        - max(_repeated(_ngrams(said, 3)), _repeated(_sentences(response)), _copied(prompt, said)),
        "concise": _concise(len(said)),
        "clean": _clean(response),
    }


def words(text: str) -> list[str]:
    """Return lower-case words and numbers; an apostrophe inside a word belongs to the word."""
    return [word.replace("\u2019", "'") for word in _WORD.findall(text.lower())]


def content_words(text: str) -> list[str]:
    """Return the distinct words that carry the topic, in the singular and in order of appearance."""
    kept = [_singular(word) for word in words(text) if word not in FUNCTION_WORDS]
    return list(dict.fromkeys(word for word in kept if word not in INSTRUCTION_WORDS))


def last_user_turn(prompt: str) -> str:
    """Return the user's last turn in a transcript, or the whole prompt where it has no turns."""
    parts = _TURN.split(prompt)
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    return next((text for role, text in reversed(turns) if role in ("Human", "User") and text.strip()), prompt)


def reads_as_ended(text: str, finished: bool) -> bool:
    """Return whether the text looks complete; `finished` text may also end with a list item or a short line."""
    text = text.rstrip()
    if text[-1:] and text[-1] in _ENDINGS:
        # "3." alone on a line begins a list item that is missing.
        return not re.fullmatch(r"\s*\d+[.)]", text.splitlines()[-1])
    last = text.splitlines()[-1] if text else ""
    said = words(last)
    if not finished or not said or said[-1] in FUNCTION_WORDS or last[-1] in ",:;-\u2013\u2014":
        return False
    return bool(_LIST_ITEM.match(last)) or len(said) <= 8


def same_word(a: str, b: str) -> bool:
    """Return whether two singular words count as one word, by their common prefix."""
    if a == b:
        return True
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return shared >= max(4, min(len(a), len(b)) - 2)


def _singular(word: str) -> str:
    word = word.removesuffix("'s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _on_topic(asked: list[str], said: list[str]) -> float:
    if asked:
        spoken = {_singular(word) for word in said}
        touched = sum(any(same_word(word, other) for other in spoken) for word in asked)
        share = min(1.0, touched / min(3, -(-len(asked) // 3)))
    else:
        share = 1.0  # a request without content words: "hi", "thanks, and then?"
    if len(said) <= 6:
        return share
    return share * min(1.0, 8 * sum(word in FUNCTION_WORDS for word in said) / len(said))


def _copied(prompt: str, said: list[str]) -> float:
    """Return the larger of the shares of runs and of content words that come from the prompt."""
    given = words(prompt)
    n = max(3, min(6, len(given)))
    runs, known = _ngrams(said, n), set(_ngrams(given, n))
    by_run = sum(run in known for run in runs) / len(runs) if runs else 0.0
    content = [_singular(word) for word in said if word not in FUNCTION_WORDS]
    if len(said) < 4 or not content:
        return by_run
    vocabulary = {_singular(word) for word in given}
    by_word = sum(word in vocabulary for word in content) / len(content)
    return max(by_run, (by_word - 0.75) * 4)


def _concise(n: int) -> float:
    if n < 4:
        return n / 4
    return 1.0 if n <= 45 else max(0.0, (90 - n) / 45)


def _clean(text: str) -> float:
    if _LEFTOVER.search(text) or _JUNK_RUN.search(text):
        return 0.0
    fine = sum(c.isalnum() or c.isspace() or c in _TYPOGRAPHY or (c.isascii() and c.isprintable()) for c in text)
    return 1.0 if fine >= 0.95 * len(text) else fine / len(text)


def _ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def _sentences(text: str) -> list[tuple[str, ...]]:
    return [tuple(said) for part in _SENTENCE_END.split(text) if (said := words(part))]


def _repeated(items: Sequence[tuple[str, ...]]) -> float:
    """Return the share of items that repeat an earlier one."""
    return 1 - len(set(items)) / len(items) if items else 0.0
