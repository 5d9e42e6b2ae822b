"""The evaluate stage asks nothing that an earlier stage has read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.data.records import Drops
from rlhf.evaluation.heldout import unseen_prompts, unseen_texts
from rlhf.recipe import load_recipe


def test_held_out_means_held_out(tmp_path: Path) -> None:
    def write(name: str, *lines: dict[str, Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"data.{name.removesuffix('.jsonl')}=[{path}]"

    asked = [{"prompt": f"Name a {what}."} for what in ("river", "hill", "bay", "sea")]
    recipe = load_recipe(
        "tiny",
        [
            write("prompts.jsonl", {"prompt": "Name a river."}),
            write("demonstrations.jsonl", {"prompt": "Name a hill.", "response": "Arthur's Seat."}),
            write("rankings.jsonl", {"prompt": "Name a bay.", "responses": ["Baffin Bay.", "No."], "ranks": [1, 2]}),
            write("prompts_heldout.jsonl", *asked),
            write("pretraining.jsonl", {"text": "Tea is a drink."}),
            write("pretraining_heldout.jsonl", {"text": "Tea is a drink."}, {"text": "Bread is a food."}),
        ],
    )
    drops = Drops()
    assert [prompt.text for prompt in unseen_prompts(recipe, drops)] == ["Name a sea."]
    assert unseen_texts(recipe, drops) == ["Bread is a food."]
    assert dict(drops.table()) == {
        "held-out prompt that is also in the training data": 3,
        "held-out text that is also in the training data": 1,
    }
