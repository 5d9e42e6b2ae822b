"""Evaluation of every policy of a run on held-out prompts (paper section 4): `python stages/evaluate.py RECIPE`.

    find        the run's policies, and the templates that some of them also answer under
    sample      every policy answers the same prompts with the same seeds
    tax         every policy's loss on held-out pretraining text and accuracy on cloze questions
    kl          to the SFT policy, the reference of PPO, on each policy's own samples
    score       by the reward model, if the run has one
    compare     every pair of policies by the evaluation labeler, asked in both orders
    write       results.json, samples.jsonl and the tracker's table

One model is in memory at a time. The reward score says how far PPO pushed its own objective, the labeler's win rate
whether that was worth anything: read them together. Two things are deliberately left out: the significance of
differences in other metrics, and public benchmarks (lm-eval reads the models, which are plain Hugging Face folders).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.chat_template import stop_ids
from rlhf.data.prompt_template import Template, find_template, load_template
from rlhf.data.records import Drops, write_jsonl
from rlhf.evaluation.alignment_tax import cloze_accuracy, pretraining_loss
from rlhf.evaluation.heldout import HeldOut, read_heldout
from rlhf.evaluation.prompted_baseline import answer_prompted
from rlhf.evaluation.results import Answers, PairWins, all_results, headline, sample_rows
from rlhf.evaluation.win_rate import pairwise_wins
from rlhf.functional.ppo import kl_k1, kl_k3
from rlhf.functional.seeding import row_seed
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
from rlhf.system.files import write_atomic
from rlhf.system.phases import phase
from rlhf.system.ranks import is_main_process
from rlhf.training.reward_format import own_format, reward_pairs


def find_policies(run: RunFolder, ema: bool) -> dict[str, Path]:
    """Return the folders of the run's policies by name, SFT first; with `ema` also those of averaged weights.

    Raises UserError if there is no SFT policy, which everything is compared with.
    """
    found = {"sft": run.require("sft", "model")}
    for name in reversed(PPO_VARIANTS):
        if run.read_stage(name) is None and not run.model_dir(name).is_dir():
            continue
        found[name] = run.require(name, "model")
        if ema and (run.stage_dir(name) / "ema").is_dir():
            found[f"{name}-ema"] = run.stage_dir(name) / "ema"
    return found


def find_templates(ctx: StageContext) -> list[Template]:
    """Return the templates that policies answer under; their files become inputs of the stage, as do the judge's."""
    recipe, names = ctx.recipe, list(dict.fromkeys(ctx.recipe.evaluate.prompted))
    judged = judge_files(recipe.judge) if recipe.evaluate.labeler == "judge" else []
    for path in [*(find_template(name, "answer") for name in names), *judged]:
        ctx.use(path)
    return [load_template(name, "answer") for name in names]


def sample_answers(
    recipe: Recipe, name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: HeldOut
) -> Answers:
    """Sample the policy's responses."""
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
    return Answers(rollout, rollout.texts(tokenizer))


def sample_prompted_answers(
    recipe: Recipe, name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: HeldOut, template: Template
) -> Answers:
    """Sample the policy's responses under a template; such answers have neither tax nor KL."""
    phase("rollout")
    with Progress(f"{name}: sampling", total=len(asked.ids) * (1 + template.reasons), unit="texts") as progress:
        found = answer_prompted(recipe, policy, tokenizer, template, asked, progress.advance)
    return Answers(found.rollout, found.texts, prompted=template.name)


def measure_tax(
    recipe: Recipe, name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: HeldOut
) -> dict[str, Any]:
    """Return the fields of the policy's alignment tax, of which those without held-out data are left out."""
    phase("score")
    tokens, tax = recipe.ppo.score_tokens, dict[str, Any]()
    if asked.text_rows:
        with Progress(f"{name}: pretraining loss", total=len(asked.text_rows), unit="rows") as progress:
            loss, count = pretraining_loss(policy, asked.text_rows, tokens, progress.advance)
        tax |= {"pretraining_loss": loss, "pretraining_tokens": count}
    if asked.cloze:
        choices = sum(len(question.choices) for question in asked.cloze)
        with Progress(f"{name}: cloze questions", total=choices, unit="choices") as progress:
            tax |= cloze_accuracy(policy, tokenizer, asked.cloze, tokens, progress.advance).row()
    return tax


def add_kl(recipe: Recipe, reference: nn.Module, answers: dict[str, Answers]) -> None:
    """Add to every response its KL to the SFT policy: its tokens' k1 and k3 estimates, summed; 0 for SFT itself."""
    answers["sft"].kl = answers["sft"].kl_k3 = [0.0] * len(answers["sft"].rollout)
    others = [answer for name, answer in answers.items() if name != "sft" and not answer.prompted]
    with Progress("KL to sft", total=sum(len(a.rollout) for a in others), unit="responses") as progress:
        for answer in others:
            pairs = answer.rollout.pairs()
            how = (recipe.evaluate.temperature, recipe.ppo.score_tokens, progress.advance)
            reference_rows = token_logprobs(reference, pairs, *how)
            for own, ref in zip(answer.rollout.logprobs, reference_rows, strict=True):
                own = own[: len(ref)]
                answer.kl.append(float(kl_k1(own, ref).sum()))
                answer.kl_k3.append(float(kl_k3(own, ref).sum()))


def answer_all(
    ctx: StageContext,
    folders: dict[str, Path],
    templates: list[Template],
    tokenizer: PreTrainedTokenizerBase,
    asked: HeldOut,
) -> dict[str, Answers]:
    """Load one policy after the other and return its answers, with tax and KL; those of the run's policies come first.

    SFT is loaded last: while it is in memory it is also the reference of all the others. A requested stop ends this
    between two policies.
    """
    recipe = ctx.recipe
    prompted = dict.fromkeys(recipe.evaluate.prompted_policies) if templates else {}
    answers: dict[str, Answers] = {}
    for name in [*(n for n in folders if n != "sft"), *(n for n in prompted if n == "base"), "sft"]:
        if ctx.stop_requested:
            return answers
        where = folders.get(name, recipe.model.name)  # the base, for what answers under a template
        policy = load_frozen_policy(recipe, ctx.device, where, tokenizer)
        if name in folders:
            answers[name] = sample_answers(recipe, name, policy, tokenizer, asked)
            answers[name].tax = measure_tax(recipe, name, policy, tokenizer, asked)
        if name == "sft":
            add_kl(recipe, policy, answers)
        for template in templates if name in prompted else []:
            under = f"{name}-{template.name}"
            answers[under] = sample_prompted_answers(recipe, under, policy, tokenizer, asked, template)
        del policy  # before the next one is loaded
    return {name: answers[name] for name in [*folders, *(n for n in answers if n not in folders)]}


def add_scores(
    ctx: StageContext, tokenizer: PreTrainedTokenizerBase, asked: HeldOut, answers: dict[str, Answers]
) -> None:
    """Add to every response its normalised reward-model score, if the run has a reward model."""
    recipe, reward_dir = ctx.recipe, ctx.run.model_dir("reward")
    if not reward_dir.is_dir():
        return
    ctx.use(reward_dir)
    reward_model = frozen(recipe, ctx.device, lambda: load_reward_model(reward_dir, recipe.reward_format))
    check_probes(reward_model, reward_dir)
    own = own_format(recipe, tokenizer, reward_dir, zip(asked.row_prompts, asked.ids, strict=True))
    with Progress("reward model", total=sum(len(a.rollout) for a in answers.values()), unit="responses") as progress:
        for answer in answers.values():
            pairs = reward_pairs(answer.rollout, own)
            found: Tensor = scores(reward_model, pairs, recipe.ppo.score_tokens, progress.advance)
            answer.scores = found.tolist()


def compare_all(ctx: StageContext, asked: HeldOut, answers: dict[str, Answers]) -> list[PairWins]:
    """Ask the evaluation labeler about every pair of policies; a requested stop ends this between two prompts."""
    recipe, cfg, found = ctx.recipe, ctx.recipe.evaluate, []
    labeler, pairs = make_evaluation_labeler(recipe, ctx.run), list(combinations(answers, 2))
    with Progress("comparing", total=len(pairs) * len(asked.prompts), unit="prompts") as progress:
        for b, a in pairs:
            sides = [answers[name].outputs(cfg.samples_per_prompt) for name in (a, b)]
            pair = PairWins(a, b, [], row_seed(recipe.run.seed, "compare", a, b))
            found.append(pair)
            for wins in pairwise_wins(labeler, asked.prompts, *sides, pair.seed, cfg.judgements):
                pair.wins.append(wins)
                progress.advance(1)
                if ctx.stop_requested:
                    return found
    return found


def write_outputs(
    ctx: StageContext, asked: HeldOut, answers: dict[str, Answers], pairs: list[PairWins], drops: Drops
) -> dict[str, float]:
    """Write results.json, samples.jsonl and the tracker's table; return the headline metrics."""
    phase("save")
    rows = sample_rows(asked, answers, pairs)
    results = all_results(ctx.recipe.evaluate, answers, pairs, drops)
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
    """Run the steps of the heading one by one; return the headline metrics, or {} if a stop was requested."""
    recipe, drops = ctx.recipe, Drops()
    ctx.tracker.truncate_after(-1)  # the stage keeps no checkpoints: after a stop it logs everything again
    folders = find_policies(ctx.run, recipe.evaluate.ema)
    for folder in folders.values():
        ctx.use(folder)
    tokenizer = load_tokenizer(folders["sft"], recipe.model)
    templates = find_templates(ctx)
    if recipe.evaluate.labeler == "judge":
        check_context_fits(recipe)
    asked = read_heldout(recipe, tokenizer, drops)
    show_drops(drops.table())
    answers = answer_all(ctx, folders, templates, tokenizer, asked)
    if ctx.stop_requested:
        return {}
    add_scores(ctx, tokenizer, asked, answers)
    pairs = compare_all(ctx, asked, answers)
    return {} if ctx.stop_requested else write_outputs(ctx, asked, answers, pairs, drops)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("evaluate", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
