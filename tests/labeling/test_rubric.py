"""The rubric against component values worked by hand, and against texts that try to please it cheaply."""

from __future__ import annotations

import pytest

from rlhf.labeling import rubric

# Content words: bread, go, stale, faster, fridge; a third of five is two.
BREAD = "why does bread go stale faster in the fridge"
CABBAGE = "5 ideas for using up half a cabbage"  # content words: 5, using, half, cabbage; two of four
TEA = "Human: hey\n\nAssistant: Hello.\n\nHuman: Is tea good?\n\nAssistant:"  # content words: tea, good; one of two
WORDS = "The bread fridge cold dry hard crumb starch water mould paper box loaf slice toast oven."
SIXTY = " ".join(f"w{i}" for i in range(60)) + "."

# prompt, response, finished, (complete, on_topic, not_repetitive, concise, clean), score
BY_HAND = [
    # Everything a short answer needs.
    (BREAD, "Bread dries out in the fridge.", True, (1, 1, 1, 1, 1), 1.0),
    # One word of four: concise 1/4, topic untouched. 0.35 + 0.2 + 0.0375 + 0.05
    (BREAD, "Yes.", True, (1, 0, 1, 1 / 4, 1), 0.6375),
    # The prompt echoed: nine words are no short line, all four runs of 6 stand in the prompt. 0.175 + 0.25 + 0.2
    (BREAD, BREAD, True, (1 / 2, 1, 0, 1, 1), 0.625),
    # No function word among eight, and every content word is the prompt's. 0.35 + 0.15 + 0.05
    (BREAD, "bread fridge stale faster bread go fridge stale.", True, (1, 0, 0, 1, 1), 0.55),
    # 7 trigrams of which 3 differ (4/7 repeated), 3 sentences of which 1 differs (2/3). 0.175 + 0.2/3 + 0.2
    (BREAD, "It is cold. It is cold. It is cold.", False, (1 / 2, 0, 1 / 3, 1, 1), 0.175 + 0.2 / 3 + 0.2),
    # Cut off in mid-sentence; "fridge" is one of two. 0.125 + 0.2 + 0.15 + 0.05
    (BREAD, "The fridge is cold and", False, (0, 1 / 2, 1, 1, 1), 0.525),
    # A control token in the text; "bread" is one of two. 0.35 + 0.125 + 0.2 + 0.15
    (BREAD, "<|im_end|> Bread dries out.", True, (1, 1 / 2, 1, 1, 0), 0.825),
    # 60 words: (90 - 60) / 45. 0.35 + 0.2 + 0.1 + 0.05
    (BREAD, SIXTY, True, (1, 0, 1, 2 / 3, 1), 0.7),
    # A list may end without a full stop; "cabbage" is one of two. 0.35 + 0.125 + 0.2 + 0.15 + 0.05
    (CABBAGE, "- Coleslaw with cabbage\n- Fried noodles", True, (1, 1 / 2, 1, 1, 1), 0.875),
    # Speaks as the user, three words, cut off. 0.25 + 0.2 + 0.1125
    (TEA, "Human: Tea is", False, (0, 1, 1, 3 / 4, 0), 0.5625),
    # One of 16 words is a function word, half of what it takes: 1/2. 0.35 + 0.125 + 0.2 + 0.15 + 0.05
    (BREAD, WORDS, True, (1, 1 / 2, 1, 1, 1), 0.875),
    # 4 content words, 7/8 of 8 the prompt's would be (0.875 - 0.75) * 4; here bread, fridge, stale of 4: 0.75, so 0.
    (BREAD, "Bread, fridge, stale, mould.", True, (1, 1, 1, 1, 1), 1.0),
    (BREAD, " \n", True, (0, 0, 0, 0, 0), 0.0),
    (BREAD, "...", True, (0, 0, 0, 0, 0), 0.0),
]


@pytest.mark.parametrize(("prompt", "response", "finished", "values", "score"), BY_HAND)
def test_components_worked_by_hand(prompt: str, response: str, finished: bool, values: tuple, score: float) -> None:
    assert list(rubric.criteria(prompt, response, finished).values()) == pytest.approx(list(values))
    assert rubric.rubric_score(prompt, response, finished) == pytest.approx(score)


def test_weights_sum_to_one() -> None:
    assert sum(rubric.WEIGHTS.values()) == pytest.approx(1.0)


DECENT = "A cold fridge makes the starch in bread harden sooner, so a loaf turns dry. Keep it in a box on the table."


@pytest.mark.parametrize(
    ("cheap", "finished"),
    [
        ("Yes.", True),
        ("Sure! I can help you with that.", True),
        (BREAD, True),
        (BREAD.capitalize() + "?", True),
        (f"{BREAD}. {BREAD}. {BREAD}.", True),
        ("bread stale faster fridge.", True),
        ("bread fridge stale faster bread go fridge stale faster go bread fridge.", True),
        ("The bread is stale and the fridge is faster to go.", True),
        ("\n".join(f"{i}. bread" for i in range(1, 30)), False),
        ("\n".join(f"{i}. item{i}" for i in range(1, 40)), True),
        ("Bread is a thing that people eat, and the fridge is a place where they like to have it, because then", False),
        ("Bread goes stale. " * 8, True),
        ("!!!!!!!!!!!!!!!!", True),
        ("", True),
    ],
)
def test_a_cheap_text_scores_below_a_decent_answer(cheap: str, finished: bool) -> None:
    assert rubric.rubric_score(BREAD, cheap, finished) <= rubric.rubric_score(BREAD, DECENT, True) - 0.1


def test_an_answer_to_another_question_scores_lower() -> None:
    assert rubric.rubric_score(CABBAGE, DECENT, True) == pytest.approx(rubric.rubric_score(BREAD, DECENT, True) - 0.25)


def test_topic_is_the_last_user_turn() -> None:
    assert rubric.last_user_turn(TEA).strip() == "Is tea good?"
    assert rubric.last_user_turn(BREAD) == BREAD
    assert rubric.content_words("Write two short sentences about my sister's cats, please") == ["sister", "cat"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("library", "librarie", True),  # 6 letters shared, the shorter has 7
        ("cook", "cooking", True),
        ("bake", "baking", False),  # "bak" is three letters
        ("cat", "cat", True),
        ("cat", "category", False),  # three letters
        ("stale", "stake", False),
    ],
)
def test_same_word(a: str, b: str, same: bool) -> None:
    assert rubric.same_word(a, b) is same and rubric.same_word(b, a) is same


@pytest.mark.parametrize(
    ("text", "finished", "ended"),
    [
        ("Done.", False, True),
        ('He said "no"', False, True),
        ("f(x)", False, True),
        ("Puddle & Spoke", True, True),
        ("Puddle & Spoke", False, False),
        ("It is one of the", True, False),  # stops at a function word
        ("First the eggs,", True, False),
        ("one two three four five six seven eight nine", True, False),  # nine words are no short line
        ("1. Soup\n2. Salad with plenty of apple and some nuts thrown over everything", True, True),
        ("1. Soup\n2.", False, False),
        ("", True, False),
    ],
)
def test_reads_as_ended(text: str, finished: bool, ended: bool) -> None:
    assert rubric.reads_as_ended(text, finished) is ended
