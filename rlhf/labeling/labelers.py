"""Labelers: who says which of several outputs to one prompt is better. Every labeler sees texts, never token ids.

`rubric` is the simulated labeler (rlhf/labeling/rubric.py) with noise like a person's; `reward_model` ranks by a
trained reward model, `judge` by the answers of a language model (rlhf/labeling/judge/labeler.py). `make_labeler` is the
one place that knows their names. A file of rankings needs no labeler: the rank stage copies it. Deliberately not done:
one noise level for each labeler or prompt, and labelers that err together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.labeling.base import Labeler
from rlhf.labeling.reward_model_labeler import _reward_model_labeler
from rlhf.labeling.rubric_labeler import RubricLabeler

if TYPE_CHECKING:
    from rlhf.run.folder import RunFolder


def make_labeler(
    name: str, recipe: Recipe, run: RunFolder, noise_sigma: float | None = None, log: Path | None = None
) -> Labeler:
    """The labeler that a recipe names.

    Args:
        name: `rank.labeler` or `evaluate.labeler`.
        run: where the rank stage left its noise, and the reward stage its model.
        noise_sigma: the rubric's noise; None takes that of the rank stage (rank/summary.json), 0 when there is none.
        log: where a judge's answers are kept, and looked for.

    Raises:
        UserError: for a labeler that ranks nothing here (`file`, `human`), or a reward model that is not there.
    """
    if name == "rubric":
        return RubricLabeler(stored_noise(run) if noise_sigma is None else noise_sigma, recipe.rank.tie_margin)
    if name == "reward_model":
        return _reward_model_labeler(recipe, run)
    if name == "judge":
        from rlhf.labeling.judge.judge import load_judge
        from rlhf.labeling.judge.labeler import JudgeLabeler

        return JudgeLabeler(load_judge(recipe, log), recipe.judge.tie_margin)
    if name == "file":
        raise UserError(
            "rankings from files are read, nothing is labelled", "rank.labeler", "name the files in data.rankings"
        )
    raise UserError(
        "people rank on the labelling page, which the rank stage serves",
        where="rank.labeler",
        fix="run the rank stage; or name files of rankings in data.rankings, with rank.labeler=file",
    )


def make_evaluation_labeler(recipe: Recipe, run: RunFolder) -> Labeler:
    """The evaluate stage's labeler, as noisy as the one that ranked the training data."""
    return make_labeler(recipe.evaluate.labeler, recipe, run, log=run.stage_dir("evaluate") / "judge.jsonl")


def stored_noise(run: RunFolder) -> float:
    """`noise_sigma` of rank/summary.json; 0 when the rank stage did not run or did not use the rubric."""
    path = run.path / "rank" / "summary.json"
    return float(json.loads(path.read_text()).get("noise_sigma") or 0.0) if path.exists() else 0.0
