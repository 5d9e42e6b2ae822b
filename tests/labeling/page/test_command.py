"""`rlhf label` on a run that was not ranked by people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.commands.label import outputs_of, prepare, settings, what_next
from rlhf.errors import UserError
from rlhf.labeling.page.collect import open_store

RANKED = {"responses": ["a", "b", "c"], "ranks": [1, 2, 2], "finished": [True] * 3, "rubric": [0.0] * 3}
ROWS = [RANKED | {"prompt": f"prompt {i}"} for i in range(3)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "rank").mkdir(parents=True)
    (folder / "rank" / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text("run: {name: run}\n")
    return folder


def test_outputs_that_another_labeler_has_ranked_are_ranked_by_people(run: Path) -> None:
    recipe = settings(run, "anna,ben")
    with open_store(run, recipe.label, recipe.run.seed) as store:
        prepare(run, store)
        # Three prompts by one of them, and a tenth, which is none or one, by both.
        assert store.counts().wanted in (3, 4) and store.counts().rankings == 0
        assert sorted(store.known()) == ["anna", "ben"]
    assert "ranked by rubric" in what_next(run, recipe) and f"rlhf label {run} --export" in what_next(run, recipe)
    own = run / "rank" / "outputs.jsonl"
    own.write_text(json.dumps({"prompt": "other", "responses": ["x", "y"]}) + "\n")
    assert outputs_of(run) == own


def test_without_outputs_it_says_how_to_have_some(run: Path) -> None:
    (run / "rank" / "rankings.jsonl").unlink()
    with pytest.raises(UserError, match="no outputs to rank") as error:
        outputs_of(run)
    assert "rank.labeler=human" in error.value.fix


@pytest.mark.parametrize("names", ["", "anna,anna", "a/b"])
def test_a_bad_list_of_labelers_is_refused(names: str, run: Path) -> None:
    with pytest.raises(UserError):
        settings(run, names)
