"""Make the labeler that a recipe names; every labeler sees texts, never token ids.

    rubric         the simulated labeler (rlhf/labeling/rubric.py) with noise like a person's
    reward_model   a trained reward model
    judge          the answers of a language model (rlhf/labeling/judge/labeler.py)

Rankings of rank.labeler=file and of people (rlhf/labeling/page/collect.py) are not made here. Deliberately not done: a
noise level for each labeler or prompt, and labelers whose errors are correlated.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.labeling.base import Labeler
from rlhf.labeling.judge.judge import judge_files, load_judge
from rlhf.labeling.judge.labeler import JudgeLabeler
from rlhf.labeling.reward_model_labeler import load_reward_model_labeler
from rlhf.labeling.rubric_labeler import RubricLabeler
from rlhf.run.folder import RunFolder


def make_labeler(
    name: str, recipe: Recipe, run: RunFolder, noise_sigma: float | None = None, log: Path | None = None
) -> Labeler:
    """Return the labeler of this name (a value of `rank.labeler` or `evaluate.labeler`) with the recipe's settings.

    Without `noise_sigma` the rubric's noise has the std that the run's rank stage left, or else 0. A judge's answers
    are read from `log` and appended to it. Raises UserError for `file` and `human`, which rank nothing here, and when
    the reward model does not exist.
    """
    if name == "rubric":
        return RubricLabeler(stored_noise(run) if noise_sigma is None else noise_sigma, recipe.rank.tie_margin)
    if name == "reward_model":
        return load_reward_model_labeler(recipe, run)
    if name == "judge":
        return JudgeLabeler(load_judge(recipe, log), recipe.judge.tie_margin)
    if name == "file":
        what = "rankings from files are read, nothing is labelled"
        raise UserError(what, "rank.labeler", "name the files in data.rankings")
    fix = "run the rank stage; or name files of rankings in data.rankings, with rank.labeler=file"
    raise UserError("people rank on the labelling page, which the rank stage serves", "rank.labeler", fix)


def labeler_files(name: str, recipe: Recipe) -> list[Path]:
    """Return the files and folders that the labels of this labeler depend on."""
    if name == "judge":
        return judge_files(recipe.judge)
    model = Path(recipe.rank.reward_model)
    return [model] if name == "reward_model" and model.exists() else []


def make_evaluation_labeler(recipe: Recipe, run: RunFolder) -> Labeler:
    """Return the labeler of the evaluate stage, with the noise of the one that ranked the training data."""
    return make_labeler(recipe.evaluate.labeler, recipe, run, log=run.stage_dir("evaluate") / "judge.jsonl")


def stored_noise(run: RunFolder) -> float:
    """Return `noise_sigma` of rank/summary.json; 0 when the rank stage did not run or did not use the rubric."""
    path = run.path / "rank" / "summary.json"
    return float(json.loads(path.read_text()).get("noise_sigma") or 0.0) if path.exists() else 0.0
