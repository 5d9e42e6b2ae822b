"""Evaluation of every policy of a run on held-out prompts (paper section 4): `python stages/evaluate.py RECIPE`.

    sample      every policy answers the same prompts with the same seeds, some also under a template
    tax         loss on held-out pretraining text and accuracy on cloze questions, of every policy
    kl          to the SFT policy, the reference of PPO, on each policy's own samples
    score       by the reward model, when the run has one
    compare     every pair of policies under the evaluation labeler, both orders asked

One model is in memory at a time. The reward score says how far PPO pushed its own objective, the labeler's win rate
whether that was worth anything: read them together. Deliberately not done: significance between other metrics, and
public benchmarks (the models are plain Hugging Face folders, which lm-eval reads).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import stop_ids
from rlhf.data.prompt_template import Template, find_template, load_template
from rlhf.data.records import Drops, write_jsonl
from rlhf.evaluation.alignment_tax import cloze_accuracy, pretraining_loss
from rlhf.evaluation.heldout import HeldOut, read_heldout
from rlhf.evaluation.prompted_baseline import answer_prompted
from rlhf.evaluation.results import Answers, group_by_prompt, headline, interval_row, sample_rows, summarise
from rlhf.evaluation.win_rate import pairwise_wins
from rlhf.functional.ppo import kl_k1, kl_k3
from rlhf.functional.seeding import row_seed
from rlhf.functional.statistics import length_matched_win_rate, prompt_means, win_rate
from rlhf.labeling.base import Labeler
from rlhf.labeling.judge.judge import check_context_fits, judge_files
from rlhf.labeling.labelers import make_evaluation_labeler
from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.models.zero import frozen, load_frozen_policy
from rlhf.rollout.probes import check_probes
from rlhf.rollout.rescoring import rescore
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import scores, token_logprobs
from rlhf.run.folder import RunFolder
from rlhf.run.stage import StageContext, run_stage
from rlhf.stage_table import PPO_VARIANTS
from rlhf.system.console import Progress, show_drops
from rlhf.system.distributed import is_main_process
from rlhf.system.files import write_atomic
from rlhf.system.phases import phase


def find_policies(run: RunFolder, ema: bool) -> dict[str, Path]:
    """Folders of the policies that this run has, by name; the averaged ones too when `ema`.

    Raises:
        UserError: without an SFT policy, which everything is compared with.
    """
    found = {"sft": run.require("sft", "model")}
    for name in reversed(PPO_VARIANTS):
        if run.read_stage(name) is None and not run.model_dir(name).is_dir():
            continue
        found[name] = run.require(name, "model")
        if ema and (run.stage_dir(name) / "ema").is_dir():
            found[f"{name}-ema"] = run.stage_dir(name) / "ema"
    return found


def templates_in_use(ctx: StageContext) -> list[Template]:
    """The templates that policies answer under; their files are inputs, and so are the judge's."""
    recipe, names = ctx.recipe, list(dict.fromkeys(ctx.recipe.evaluate.prompted))
    judged = judge_files(recipe.judge) if recipe.evaluate.labeler == "judge" else []
    for path in [*(find_template(name, "answer") for name in names), *judged]:
        ctx.use(path)
    return [load_template(name, "answer") for name in names]


def sample_answers(
    recipe: Recipe, name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: HeldOut
) -> Answers:
    """Sample the policy's responses and measure its alignment tax."""
    tokens = recipe.ppo.score_tokens
    phase("rollout")
    with Progress(f"{name}: sampling", total=len(asked.ids), unit="responses") as progress:
        rollout = sample(
            policy,
            tokenizer,
            asked.ids,
            SamplingParams.from_recipe(recipe, recipe.evaluate.temperature, stop_ids(tokenizer, policy)),
            seeds=asked.seeds,
            advance=progress.advance,
        )
    rescore(recipe, rollout, policy, recipe.evaluate.temperature)
    phase("score")
    tax: dict[str, Any] = {}
    if asked.text_rows:
        with Progress(f"{name}: pretraining loss", total=len(asked.text_rows), unit="rows") as progress:
            tax["pretraining_loss"], tax["pretraining_tokens"] = pretraining_loss(
                policy, asked.text_rows, tokens, progress.advance
            )
    if asked.cloze:
        choices = sum(len(question.choices) for question in asked.cloze)
        with Progress(f"{name}: cloze questions", total=choices, unit="choices") as progress:
            result = cloze_accuracy(policy, tokenizer, asked.cloze, tokens, progress.advance)
        tax |= {
            "cloze_accuracy": result.accuracy.mean,
            "cloze_low": result.accuracy.low,
            "cloze_high": result.accuracy.high,
            "cloze_accuracy_sum": result.accuracy_sum.mean,
            "cloze_n": result.n,
        }
    return Answers(rollout, rollout.texts(tokenizer), tax)


def sample_prompted_answers(
    recipe: Recipe,
    name: str,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: HeldOut,
    template: Template,
) -> Answers:
    """Sample the policy's responses under a template; it has no tax and no KL of its own."""
    phase("rollout")
    prompts = [prompt for prompt in asked.prompts for _ in range(recipe.evaluate.samples_per_prompt)]
    with Progress(f"{name}: sampling", total=len(prompts) * (1 + template.reasons), unit="texts") as progress:
        found = answer_prompted(recipe, policy, tokenizer, template, prompts, asked.ids, asked.seeds, progress.advance)
    return Answers(found.rollout, found.texts, {}, prompted=template.name)


def add_kl(recipe: Recipe, reference: nn.Module, answers: dict[str, Answers]) -> None:
    """KL to the reference of every response: its tokens' k1 and k3 estimates, summed. SFT is the reference: 0."""
    answers["sft"].kl = answers["sft"].kl_k3 = [0.0] * len(answers["sft"].rollout)
    others = [answer for name, answer in answers.items() if name != "sft" and not answer.prompted]
    with Progress("KL to sft", total=sum(len(a.rollout) for a in others), unit="responses") as progress:
        for answer in others:
            pairs = answer.rollout.pairs()
            reference_rows = token_logprobs(
                reference, pairs, recipe.evaluate.temperature, recipe.ppo.score_tokens, progress.advance
            )
            for own, ref in zip(answer.rollout.logprobs, reference_rows, strict=True):
                own = own[: len(ref)]
                answer.kl.append(float(kl_k1(own, ref).sum()))
                answer.kl_k3.append(float(kl_k3(own, ref).sum()))


def add_scores(recipe: Recipe, reward_model: nn.Module, answers: dict[str, Answers]) -> None:
    """Normalised reward-model score of every response."""
    with Progress("reward model", total=sum(len(a.rollout) for a in answers.values()), unit="responses") as progress:
        for answer in answers.values():
            found: Tensor = scores(reward_model, answer.rollout.pairs(), recipe.ppo.score_tokens, progress.advance)
            answer.scores = found.tolist()


def compare_all(
    recipe: Recipe,
    labeler: Labeler,
    asked: HeldOut,
    answers: dict[str, Answers],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[list[dict[str, Any]], dict[str, list[float]]] | None:
    """Win rates of every pair of policies, and for each policy its wins over SFT by row; None when told to `stop`."""
    cfg, rows, over_sft = recipe.evaluate, [], {}
    pairs = list(combinations(answers, 2))
    with Progress("comparing", total=len(pairs) * len(asked.prompts), unit="prompts") as progress:
        for b, a in pairs:
            sides = [answers[name].outputs(cfg.samples_per_prompt) for name in (a, b)]
            seed = row_seed(recipe.run.seed, "compare", a, b)
            wins = pairwise_wins(labeler, asked.prompts, *sides, seed, progress.advance, cfg.judgements, stop)
            if stop():
                return None
            lengths = [
                group_by_prompt(answers[name].rollout.lengths.tolist(), cfg.samples_per_prompt) for name in (a, b)
            ]
            rate = win_rate(prompt_means(wins), cfg.bootstrap, seed)
            matched, n = length_matched_win_rate(wins, *lengths, resamples=cfg.bootstrap, seed=seed)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    **interval_row(rate, len(wins)),
                    "length_matched": interval_row(matched, n) if matched else None,
                }
            )
            if b == "sft":
                over_sft[a] = [win for row in wins for win in row]
    return rows, over_sft


def write_outputs(ctx: StageContext, results: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """results.json, samples.jsonl and the tracker's table; returns the headline metrics."""
    if is_main_process():
        write_jsonl(ctx.dir / "samples.jsonl", rows)
        write_atomic(ctx.dir / "results.json", json.dumps(results, indent=1))
    metrics, step = headline(results), sum(sum(row["lengths"].values()) for row in rows)
    ctx.tracker.log(metrics, step)
    table = [
        [row["prompt"], name, text, row["scores"].get(name), row["kl"][name]]
        for row in rows
        for name, text in row["responses"].items()
    ]
    ctx.tracker.table("samples", ["prompt", "policy", "response", "score", "kl"], table, step)
    return metrics


def run(ctx: StageContext) -> dict[str, Any]:
    """The stage."""
    recipe, cfg, drops = ctx.recipe, ctx.recipe.evaluate, Drops()
    ctx.tracker.truncate_after(-1)  # it keeps no checkpoints: a run that was stopped logs everything again
    folders = find_policies(ctx.run, cfg.ema)
    for folder in folders.values():
        ctx.use(folder)
    tokenizer = load_tokenizer(folders["sft"], recipe.model)
    templates = templates_in_use(ctx)
    if cfg.labeler == "judge":
        check_context_fits(recipe)
    asked = read_heldout(recipe, tokenizer, drops)
    show_drops(drops.table())

    def load(name: str) -> nn.Module:
        where = folders.get(name, recipe.model.name)  # the base, for what answers under a template
        return load_frozen_policy(recipe, ctx.device, where, tokenizer)

    answers: dict[str, Answers] = {}
    under = {name: templates for name in dict.fromkeys(cfg.prompted_policies) if templates}
    # SFT comes last: while it is in memory it is also the reference of all the others.
    for name in [*(n for n in folders if n != "sft"), *(n for n in under if n == "base"), "sft"]:
        if ctx.stop_requested:
            return {}
        policy = load(name)
        if name in folders:
            answers[name] = sample_answers(recipe, name, policy, tokenizer, asked)
        if name == "sft":
            add_kl(recipe, policy, answers)
        for template in under.get(name, []):
            called = f"{name}-{template.name}"
            answers[called] = sample_prompted_answers(recipe, called, policy, tokenizer, asked, template)
        del policy  # before the next one is loaded
    answers = {name: answers[name] for name in [*folders, *(n for n in answers if n not in folders)]}

    reward_dir = ctx.run.model_dir("reward")
    if reward_dir.is_dir():
        ctx.use(reward_dir)
        reward_model = frozen(recipe, ctx.device, lambda: load_reward_model(reward_dir, recipe.model))
        check_probes(reward_model, reward_dir)
        add_scores(recipe, reward_model, answers)
        del reward_model

    found = compare_all(recipe, make_evaluation_labeler(recipe, ctx.run), asked, answers, lambda: ctx.stop_requested)
    if found is None:
        return {}
    comparisons, over_sft = found
    phase("save")
    results = {
        "labeler": cfg.labeler,
        "prompts": len(asked.prompts),
        "samples_per_prompt": cfg.samples_per_prompt,
        "judgements": cfg.judgements,
        "temperature": cfg.temperature,
        "bootstrap": cfg.bootstrap,
        "drops": drops.table(),
        "policies": {name: summarise(answer) for name, answer in answers.items()},
        "comparisons": comparisons,
    }
    return write_outputs(ctx, results, sample_rows(asked, answers, over_sft, cfg.samples_per_prompt))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("evaluate", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
