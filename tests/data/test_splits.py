"""Splits by prompt: worked by hand, and what must hold for any data."""

from __future__ import annotations

import hashlib

import pytest

from rlhf.data.records import Demonstration, Prompt, Ranking
from rlhf.data.splits import split_by_prompt

PROMPTS = [Prompt.from_text(f"question {i}") for i in range(1000)]


def test_the_hash_decides() -> None:
    # sha256("7:" + sha256("question 0")) begins with these 13 digits; their share of 16^13 is where the prompt falls.
    key = hashlib.sha256(b"question 0").hexdigest()
    position = int(hashlib.sha256(f"7:{key}".encode()).hexdigest()[:13], 16) / 2**52
    assert split_by_prompt(PROMPTS[:1], position + 1e-9, seed=7) == ([], PROMPTS[:1])
    assert split_by_prompt(PROMPTS[:1], position - 1e-9, seed=7) == (PROMPTS[:1], [])


def test_a_prompt_is_on_one_side_only() -> None:
    rankings = [Ranking(p, (f"a{i}", "b"), (1, 2)) for i in range(3) for p in PROMPTS]
    train, heldout = split_by_prompt(rankings, 0.2, seed=1)
    assert len(train) + len(heldout) == 3000
    assert not {r.prompt.key for r in train} & {r.prompt.key for r in heldout}
    # The same prompt, spaced and labelled otherwise and in another kind of record, falls on the same side.
    spaced = [Demonstration(Prompt.from_text(p.text.replace(" ", "\n"), "chat"), "x") for p in PROMPTS]
    others = split_by_prompt(spaced, 0.2, seed=1)
    assert {d.prompt.key for d in others[1]} == {r.prompt.key for r in heldout}


def test_shares_order_and_stability() -> None:
    train, heldout = split_by_prompt(PROMPTS, 0.2, seed=1)
    assert 150 <= len(heldout) <= 250  # 200 expected; the standard deviation is 12.6
    order = {p: i for i, p in enumerate(PROMPTS)}
    assert all([order[p] for p in part] == sorted(order[p] for p in part) for part in (train, heldout))
    # Other rows, another order: no prompt changes sides. A larger share keeps what was held out.
    assert set(split_by_prompt(PROMPTS[::-2], 0.2, seed=1)[1]) == set(heldout) & set(PROMPTS[::-2])
    assert set(heldout) < set(split_by_prompt(PROMPTS, 0.4, seed=1)[1])
    assert set(split_by_prompt(PROMPTS, 0.2, seed=2)[1]) != set(heldout)


def test_no_share_and_no_rows() -> None:
    assert split_by_prompt(PROMPTS, 0, seed=1) == (PROMPTS, [])
    assert split_by_prompt([], 0.5, seed=1) == ([], [])
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="not in"):
            split_by_prompt(PROMPTS, fraction, seed=1)
