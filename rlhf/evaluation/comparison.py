"""The numbers of a comparison: one row for each arm, from the files that its stages wrote. No model is run here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.evaluation.comparison_file import Comparison
from rlhf.evaluation.win_rate import pairwise_wins
from rlhf.functional.statistics import ENOUGH_PROMPTS, Interval, mean_interval, prompt_means, win_rate
from rlhf.run.folder import RunFolder, live_owner
from rlhf.system.files import read_json, read_rows

# In model/: only the trained weights. A folder with both has what they make for peft in the second.
ADAPTERS = ("adapter.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class ArmResult:
    """The numbers of one arm; None for those that its stages have not written (yet)."""

    arm: str
    method: str  # model.peft.method
    lr: tuple[float, float]  # of SFT and of PPO
    state: str  # done, failed, stopped, running, interrupted, unfinished (some stages have not run) or not run
    reason: str = ""  # why the arm is not done
    trained: int | None = None  # number of trained weights
    share: float | None = None  # of all weights, including those that the method adds
    sft_bytes: int | None = None  # size of the weight files that the stage wrote
    ppo_bytes: int | None = None
    sft_loss_before: float | None = None  # on held-out demonstrations, nats per token
    sft_loss: float | None = None
    train_score: float | None = None  # the last PPO iteration's mean
    score: float | None = None  # held-out mean after PPO
    score_sft: float | None = None  # held-out mean of the arm's own SFT policy
    gain: Interval | None = None  # score minus score_sft
    gain_reference: Interval | None = None  # score minus that of the reference's SFT policy
    versus_reference: Interval | None = None  # score minus the reference's; None for the reference
    kl: float | None = None  # to its own SFT policy on held-out prompts, nats per response
    win_rate: Interval | None = None  # over its own SFT policy
    win_rate_reference: Interval | None = None  # over the reference's SFT policy
    prompts: int = 0  # held-out prompts
    sft_seconds: float | None = None
    ppo_seconds: float | None = None
    peak_gb: float | None = None  # in PPO

    @property
    def finding(self) -> str:
        """Return what PPO did to the held-out score, claiming no more than the interval allows."""
        return finding(self.gain, 0.0, self.prompts, ("learned", "learned nothing", "got worse"))

    @property
    def preference(self) -> str:
        """Return which policy the labeler prefers: the arm's after PPO or its own SFT policy."""
        return finding(self.win_rate, 0.5, self.prompts, ("preferred", "no clear difference", "SFT preferred"))

    @property
    def standing(self) -> str:
        """Return how the score compares with that of the reference after PPO."""
        return finding(self.versus_reference, 0.0, self.prompts, ("above", "no clear difference", "below"))


def finding(interval: Interval | None, start: float, prompts: int, words: tuple[str, str, str]) -> str:
    """Return the word for an interval above `start`, including it, or below it; an empty one without an interval."""
    if interval is None:
        return ""
    if prompts < ENOUGH_PROMPTS:
        return "too few prompts to tell"
    return words[0] if interval.low > start else words[2] if interval.high < start else words[1]


def arm_results(comparison: Comparison, reasons: Mapping[str, str] | None = None) -> list[ArmResult]:
    """Return one row for each arm, in the file's order; raise UserError if a file of a run cannot be read.

    `reasons` gives, by arm, why it failed if no stage could record that itself.
    """
    folder, variant, found = comparison.folder, comparison.variant, []
    reference = RunFolder(folder / comparison.reference)
    reference_answers = {policy: _answers(reference, policy) for policy in ("sft", variant)}
    base_weights = max(_weights(folder / arm / "sft" / "model", plain=True)[0] for arm in comparison.arms)
    for arm in comparison.arms:
        run, recipe = RunFolder(folder / arm), comparison.load(arm)
        state, reason = _state(run, recipe)
        if reasons and arm in reasons:
            state, reason = "failed", reasons[arm]
        method, lr = recipe.model.peft.method, (recipe.sft.lr, recipe.ppo.lr)
        numbers = _training(run, variant, method, base_weights)
        numbers |= _evaluation(run, recipe, variant, reference, reference_answers)
        found.append(ArmResult(arm, method, lr, state, reason, **numbers))
    return found


def why_failed(stage: str, record: dict[str, Any] | None) -> str:
    """Return one line that says why the stage failed, from its stage.json; empty if it did not fail."""
    if not record or record.get("state") != "failed":
        return ""
    line = str(record.get("error") or "no reason given").split("\n")[0]
    return f"{stage}: {line.removeprefix('UserError: ')}"


def as_dicts(found: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """Return the rows as JSON values; an interval becomes {"mean", "low", "high"}."""

    def plain(value: Any) -> Any:
        return value._asdict() if isinstance(value, Interval) else value

    shown = ("finding", "preference", "standing")
    return [{key: plain(getattr(row, key)) for key in (*asdict(row), *shown)} for row in found]


# --- what the stages wrote -------------------------------------------------------------------------------------------


def _state(run: RunFolder, recipe: Recipe) -> tuple[str, str]:
    """Return the state of an arm, as in `ArmResult`, and why it is not done if a stage recorded that."""
    states = {}
    for stage in recipe.run.stages:
        record = run.read_stage(stage)
        states[stage] = str(record.get("state")) if record else "not run"
        if states[stage] == "failed":
            return "failed", why_failed(stage, record)
    if all(state == "done" for state in states.values()):
        return "done", ""
    for stage, state in states.items():
        if state == "running":
            return ("running", "") if live_owner(run.path) else ("interrupted", f"{stage} was interrupted")
        if state == "stopped":
            return "stopped", f"{stage} was stopped"
    return ("not run", "") if set(states.values()) == {"not run"} else ("unfinished", "")


def _training(run: RunFolder, variant: str, method: str, base_weights: int) -> dict[str, Any]:
    """Return the fields of `ArmResult` that SFT and PPO recorded; `base_weights` is 0 if no arm trains all weights."""
    records = {stage: run.read_stage(stage) or {} for stage in ("sft", variant)}
    sft, ppo = (record.get("metrics") or {} for record in records.values())
    sft_count, sft_bytes = _weights(run.model_dir("sft"))
    ppo_count, ppo_bytes = _weights(run.model_dir(variant))
    trained = ppo_count or sft_count
    added = 0 if method in ("none", "bitfit") else trained  # these two train weights of the base
    logged = (row.get("memory/peak_gb") for row in read_rows(run.stage_dir(variant) / "metrics.jsonl"))
    return {
        "trained": trained or None,
        "share": trained / (base_weights + added) if trained and base_weights else None,
        "sft_bytes": sft_bytes or None,
        "ppo_bytes": ppo_bytes or None,
        "sft_loss_before": sft.get("sft/validation_loss_before"),
        "sft_loss": sft.get("sft/validation_loss"),
        "train_score": ppo.get("ppo/reward_score"),
        "sft_seconds": records["sft"].get("seconds"),
        "ppo_seconds": records[variant].get("seconds"),
        "peak_gb": max((peak for peak in logged if peak is not None), default=None),
    }


def _weights(folder: Path, plain: bool = False) -> tuple[int, int]:
    """Return the number of weights in a stage's model folder and their bytes on disk; only file headers are read.

    With `plain`, a folder that holds only an adapter gives zeros. Raises UserError if a file cannot be read.
    """
    adapters = [folder / name for name in ADAPTERS if (folder / name).exists()]
    if adapters and plain:
        return 0, 0
    files = adapters[:1] or sorted(folder.glob("model*.safetensors"))  # it may be split into several
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise UserError(f"the weights cannot be read: {error}", str(file), "redo the stage with --fresh") from None
        count += sum(math.prod(shape) for shape in shapes)
    return count, sum(file.stat().st_size for file in files)


# --- what evaluate wrote ---------------------------------------------------------------------------------------------

Answer = dict[str, Any]  # text, finished and score of one policy's response
Answers = dict[str, list[Answer]]  # by prompt, in the order of the samples


def _evaluation(
    run: RunFolder, recipe: Recipe, variant: str, reference: RunFolder, base: dict[str, Answers]
) -> dict[str, Any]:
    """Return the fields of `ArmResult` from evaluate/results.json and from comparing rows of samples.jsonl.

    `base` has the reference's answers by policy. Raises UserError if a file lacks what evaluate writes.
    """
    path, results = run.stage_dir("evaluate") / "results.json", _results(run)
    if variant not in results.get("policies", {}):
        return {}
    try:
        ours, sft = results["policies"][variant], results["policies"]["sft"]
        over_sft = next(each for each in results["comparisons"] if each["a"] == variant and each["b"] == "sft")
        found = {
            "score": ours["reward_score"],
            "score_sft": sft["reward_score"],
            "kl": ours["kl"],
            "win_rate": Interval(over_sft["win_rate"], over_sft["low"], over_sft["high"]),
            "prompts": results["prompts"],
        }
    except (KeyError, StopIteration, TypeError) as error:
        what = f"there is no comparison of {variant} with sft in it ({type(error).__name__}: {error})"
        fix = f"run evaluate again: rlhf evaluate {run.path / 'recipe.yaml'} --fresh"
        raise UserError(what, str(path), fix) from None
    mine, own = _answers(run, variant), _answers(run, "sft")
    found["gain"] = _difference(mine, own, recipe)
    if run.path == reference.path:
        return found | {"gain_reference": found["gain"], "win_rate_reference": found["win_rate"]}
    if base["sft"]:
        found["gain_reference"] = _difference(mine, base["sft"], recipe)
        found["versus_reference"] = _difference(mine, base[variant], recipe)
        found["win_rate_reference"] = _judge(recipe, reference, run.path.name, mine, base["sft"])
    return found


def _results(run: RunFolder) -> dict[str, Any]:
    """Return evaluate/results.json, {} if evaluate is not done."""
    return (read_json(run.stage_dir("evaluate") / "results.json") or {}) if run.is_done("evaluate") else {}


def _answers(run: RunFolder, policy: str) -> Answers:
    """Return one policy's rows of samples.jsonl, {} if evaluate did not sample it."""
    if policy not in _results(run).get("policies", {}):
        return {}
    path, found = run.stage_dir("evaluate") / "samples.jsonl", defaultdict(list)
    for number, row in enumerate(read_rows(path), 1):
        try:
            answer = {"text": row["responses"][policy], "finished": row["finished"][policy]}
            found[row["prompt"]].append(answer | {"score": row["scores"].get(policy)})
        except (KeyError, TypeError, AttributeError) as error:
            what = f"no response of {policy} ({type(error).__name__}: {error})"
            raise UserError(what, f"{path}, line {number}", "run evaluate again with --fresh") from None
    return found


def _difference(mine: Answers, theirs: Answers, recipe: Recipe) -> Interval | None:
    """Return the mean difference of two policies' scores over prompts; None if prompts differ or a score is missing."""
    if mine.keys() != theirs.keys():
        return None
    scores = [[[answer["score"] for answer in side[prompt]] for side in (mine, theirs)] for prompt in mine]
    if not scores or any(None in side for both in scores for side in both):
        return None
    differences = [fmean(ours) - fmean(others) for ours, others in scores]
    return mean_interval(differences, recipe.evaluate.bootstrap, recipe.run.seed)


def _judge(recipe: Recipe, reference: RunFolder, arm: str, mine: Answers, base: Answers) -> Interval | None:
    """Return the rubric's win rate over `base`, with evaluate's label noise; None if labeler or prompts differ."""
    same = mine.keys() == base.keys() and all(len(mine[prompt]) == len(base[prompt]) for prompt in mine)
    if recipe.evaluate.labeler != "rubric" or not same:
        return None
    from rlhf.data.records import Message, Prompt
    from rlhf.functional.seeding import row_seed
    from rlhf.labeling.base import Output  # imports torch
    from rlhf.labeling.labelers import make_evaluation_labeler

    prompts = [Prompt((Message("user", text),)) for text in mine]  # the rubric sees only the text
    sides = [[[Output(a["text"], a["finished"]) for a in side[text]] for text in mine] for side in (mine, base)]
    seed = row_seed(recipe.run.seed, "compare", "reference", arm)
    labeler = make_evaluation_labeler(recipe, reference)
    wins = list(pairwise_wins(labeler, prompts, *sides, seed, recipe.evaluate.judgements))
    return win_rate(prompt_means(wins), recipe.evaluate.bootstrap, seed)
