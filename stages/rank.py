"""Sample K outputs per prompt from the SFT policy and rank them (paper, section 3.4): `python stages/rank.py RECIPE`.

prompts   those within the length limit, in the order of their hash; the first rank.prompts of them
sample    K outputs each, in chunks that are kept as they come (rank/samples.jsonl): an interruption loses one chunk
clean     empty outputs dropped, identical ones kept once; a prompt needs two outputs
label     the simulated labeler's noise is set so that two labelers agree on rank.agreement of the pairs;
          with rank.labeler=human the stage serves the labelling page and waits until enough rankings are in
write     rank/rankings.jsonl for the reward stage, rank/summary.json for people and for evaluate

With rank.labeler=file nothing is sampled: the files of data.rankings are checked and copied into rank/rankings.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import Encoded, fit_prompts, stop_ids
from rlhf.data.records import Drops, Prompt, Ranking, ranking_row, read_prompts, read_rankings, write_jsonl
from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed
from rlhf.labeling.base import Output
from rlhf.labeling.judge.judge import check_context_fits, judge_files
from rlhf.labeling.judge.labeler import JudgeLabeler, fitting
from rlhf.labeling.labelers import make_labeler
from rlhf.labeling.outputs import Candidate, Outputs, SampledOutputs
from rlhf.labeling.page.collect import rankings_by_people
from rlhf.labeling.rubric_labeler import (
    _none_for_nan,
    expected_agreement,
    noise_for_agreement,
    rubric_scores,
    second_opinion,
)
from rlhf.labeling.summary import RankResult, summarise
from rlhf.models.loading import load_tokenizer
from rlhf.models.zero import load_frozen_policy
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.console import Progress, console, show_drops, warn
from rlhf.system.console import table as print_table
from rlhf.system.distributed import is_main_process
from rlhf.system.files import write_atomic
from rlhf.system.phases import phase

TABLE_ROWS = 64


def choose_prompts(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> list[Encoded[Prompt]]:
    """Prompts to rank, encoded, in an order that depends on their text alone."""
    recipe, count = ctx.recipe, ctx.recipe.rank.prompts
    prompts = read_prompts(recipe.data.prompts, drops)
    fitting = fit_prompts(prompts, tokenizer, recipe.data.max_prompt_tokens, drops)
    chosen = sorted(fitting, key=lambda encoded: encoded.item.key)[: count or None]
    if not chosen:
        raise UserError("no prompt is left to rank", where="data.prompts", fix="give prompts or raise the token limit")
    if len(chosen) < count:
        console.print(f"rank.prompts asks for {count} prompts, and there are {len(chosen)}")
    return chosen


def sample_outputs(
    ctx: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Encoded[Prompt]],
    samples: SampledOutputs,
) -> None:
    """Fill `samples` with K outputs for each prompt; returns early, between chunks, when a stop is requested."""
    recipe, cfg = ctx.recipe, ctx.recipe.rank
    k, size = cfg.outputs_per_prompt, max(1, cfg.batch_size // cfg.outputs_per_prompt)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    # A chunk is kept or sampled whole, so that an interrupted run decodes the same batches as one that was not.
    kept = [chunk for chunk in chunks if all(encoded.item.key in samples.rows for encoded in chunk)]
    tokens = sum(samples.tokens(chunk) for chunk in kept)
    ctx.tracker.truncate_after(tokens, again=("rank/prompts", "samples"))
    params = SamplingParams(
        max_new_tokens=recipe.data.max_response_tokens,
        temperature=cfg.temperature,
        stop_ids=stop_ids(tokenizer, policy),
        batch_size=cfg.batch_size,
    )
    with Progress(
        "rank: sampling", total=len(prompts) * k, unit="outputs", initial=sum(map(len, kept)) * k
    ) as progress:
        for chunk in chunks:
            if ctx.stop_requested:
                return
            if chunk in kept:
                continue
            begin = time.perf_counter()
            phase("rollout", chunks.index(chunk))
            rollout = sample(
                policy,
                tokenizer,
                [encoded.prompt for encoded in chunk for _ in range(k)],
                params,
                seeds=[row_seed(recipe.run.seed, "rank", encoded.item.key, i) for encoded in chunk for i in range(k)],
                advance=progress.advance,
            )
            seconds = time.perf_counter() - begin
            texts, lengths, finished = rollout.texts(tokenizer), rollout.lengths.tolist(), rollout.finished.tolist()
            tokens += sum(lengths)
            # Before the samples: a row of a chunk that is sampled again is dropped, one that is missing stays missing.
            ctx.tracker.log(
                {
                    "rank/finished_fraction": float(np.mean(finished)),
                    "rank/response_length": float(np.mean(lengths)),
                    "perf/rollout_tokens_per_s": sum(lengths) / seconds,
                },
                tokens,
            )
            ctx.tracker.flush()
            samples.add(
                [
                    {
                        "key": encoded.item.key,
                        "prompt": encoded.item.text,
                        "responses": texts[i * k : (i + 1) * k],
                        "finished": finished[i * k : (i + 1) * k],
                        "lengths": lengths[i * k : (i + 1) * k],
                    }
                    for i, encoded in enumerate(chunk)
                ]
            )


def distinct_candidates(prompts: Sequence[Encoded[Prompt]], samples: SampledOutputs, drops: Drops) -> list[Candidate]:
    """Candidates with at least two outputs that differ; what is left out is counted."""
    candidates = []
    for encoded in prompts:
        row = samples.rows[encoded.item.key]
        kept: dict[str, tuple[Output, int]] = {}
        for text, finished, length in zip(row["responses"], row["finished"], row["lengths"], strict=True):
            if not text.strip():
                drops.add("empty output")
            elif text.strip() in kept:
                drops.add("output identical to another of its prompt")
            else:
                kept[text.strip()] = (Output(text, finished), length)
        if len(kept) < 2:
            drops.add("prompt with fewer than two distinct outputs")
            continue
        candidates.append(
            Candidate(encoded.item, [output for output, _ in kept.values()], [n for _, n in kept.values()])
        )
    return candidates


def label(ctx: StageContext, candidates: Sequence[Candidate], drops: Drops) -> RankResult | None:
    """Rank every prompt's outputs; the rubric is given its noise first and asked a second time as another labeler.

    None when the stage is to stop: a judge's answers are in its log, other labelers begin again.
    """
    recipe, cfg = ctx.recipe, ctx.recipe.rank
    about: dict[str, Any] = {"noise_sigma": 0.0}
    if cfg.labeler == "rubric":
        groups = [rubric_scores(c.prompt, c.outputs) for c in candidates]
        sigma = noise_for_agreement(groups, cfg.agreement, cfg.tie_margin)
        about = {
            "noise_sigma": sigma,
            "tie_margin": cfg.tie_margin,
            "target_agreement": cfg.agreement,
            "expected_agreement": _none_for_nan(expected_agreement(groups, sigma, cfg.tie_margin)),
        }
    labeler = make_labeler(cfg.labeler, recipe, ctx.run, about["noise_sigma"], ctx.dir / "judge.jsonl")
    judged = isinstance(labeler, JudgeLabeler)
    if judged:
        candidates = fitting(labeler, candidates, drops)
    kept, rankings = [], []
    phase("score")
    with Progress("rank: labelling", total=len(candidates), unit="prompts") as progress:
        for c in candidates:
            if ctx.stop_requested:
                return None
            if judged and not labeler.answers(c.prompt, c.outputs):
                drops.add("question that the judge's endpoint refuses as too long")
            else:
                ranks = labeler.rank(c.prompt, c.outputs, recipe.run.seed)
                texts, finished = zip(*c.outputs, strict=True)
                rankings.append(Ranking(c.prompt, texts, ranks, finished))
                kept.append(c)
            progress.advance(1)
    candidates = kept
    if cfg.labeler == "rubric":
        about |= second_opinion(labeler, candidates, rankings, recipe)
    if judged:
        about |= labeler.summary()
        if about["judge_answers_without_label"]:
            warn(
                f"{about['judge_answers_without_label']} of the judge's {about['judge_answers']} answers had no label "
                "among the likeliest tokens: there it decided nothing"
            )
    return RankResult(rankings, [c.lengths for c in candidates], about)


def warn_if_over_context(recipe: Recipe) -> None:
    """Say before anything is sampled when the judge has no room for the longest prompts and outputs."""
    try:
        check_context_fits(recipe)
    except UserError as error:
        warn(f"{error.what}; prompts with longer ones are left out, or {error.fix} ({error.where})")


def label_by_people(ctx: StageContext, candidates: Sequence[Candidate]) -> RankResult | None:
    """Rankings from the labelling page, one or more for a prompt; None when the stage is to stop."""
    lengths = {Outputs(c.prompt, *map(tuple, zip(*c.outputs, strict=True))): c.lengths for c in candidates}
    found = rankings_by_people(ctx, list(lengths))
    if found is None:
        return None
    labelled, about = found
    rankings = [item.outputs.ranked(item.ranks) for item in labelled]
    row_extras = [{"labeler": item.labeler} | item.about for item in labelled]
    return RankResult(rankings, [lengths[item.outputs] for item in labelled], {"noise_sigma": 0.0} | about, row_extras)


def read_file_rankings(ctx: StageContext, drops: Drops) -> RankResult:
    """Rankings of rank.labeler=file, checked by their reader."""
    paths = ctx.recipe.data.rankings
    return RankResult(read_rankings(paths, drops), [], {"noise_sigma": 0.0})


def write(ctx: StageContext, ranked: RankResult, drops: Drops, step: int) -> dict[str, float]:
    """The stage's files, its table of samples and an example on the console; returns the metrics."""
    rankings = ranked.rankings
    scores = [
        rubric_scores(r.prompt, [Output(*o) for o in zip(r.responses, r.finished, strict=True)]) for r in rankings
    ]
    summary = {"labeler": ctx.recipe.rank.labeler} | summarise(ranked) | {"drops": dict(drops.table())}
    rows = [
        ranking_row(r) | {"use_case": r.prompt.use_case, "rubric": s} | row_extras
        for r, s, row_extras in zip(rankings, scores, ranked.row_extras or [{}] * len(rankings), strict=True)
    ]
    if is_main_process():
        write_jsonl(ctx.dir / "rankings.jsonl", rows)
        write_atomic(ctx.dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    metrics = {
        f"rank/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and name not in ("tie_margin", "target_agreement")
    }
    ctx.tracker.log(metrics, step)
    shown = [
        [r.prompt.text, rank, score, finished, text]
        for r, s in zip(rankings, scores, strict=True)
        for rank, score, finished, text in sorted(zip(r.ranks, s, r.finished, r.responses, strict=True))
    ]
    ctx.tracker.table("samples", ["prompt", "rank", "rubric", "finished", "response"], shown[:TABLE_ROWS], step)
    show_example(rankings, scores)
    return metrics


def show_example(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> None:
    """Print the prompt whose outputs the labeler told apart best, so that a person sees what was ranked."""
    i = max(range(len(rankings)), key=lambda i: len(set(rankings[i].ranks)))
    r = rankings[i]
    rows = sorted(zip(r.ranks, scores[i], r.finished, r.responses, strict=True))
    print_table(f"one ranked prompt: {r.prompt.text}", ["rank", "rubric", "finished", "output"], rows)


def fingerprint(ctx: StageContext, sft_dir: Path) -> str:
    """Hash of what the samples depend on besides the prompt: the policy's files and the sampling settings."""
    ctx.use(sft_dir)
    recipe, cfg = ctx.recipe, ctx.recipe.rank
    parts = [
        sorted(ctx.inputs.items()),
        recipe.model.model_dump(),
        [recipe.run.seed, cfg.outputs_per_prompt, cfg.temperature, cfg.batch_size, recipe.data.max_response_tokens],
    ]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def run(ctx: StageContext) -> dict[str, Any]:
    """The stage, from prompts to rankings."""
    drops = Drops()
    if ctx.recipe.rank.labeler == "file":
        ranked, tokens = read_file_rankings(ctx, drops), 0
    else:
        sft_dir = ctx.run.require("sft", "model")
        samples = SampledOutputs(ctx.dir / "samples.jsonl", fingerprint(ctx, sft_dir))
        tokenizer = load_tokenizer(sft_dir, ctx.recipe.model)
        policy = load_frozen_policy(ctx.recipe, ctx.device, sft_dir, tokenizer)
        if ctx.recipe.rank.labeler == "judge":
            warn_if_over_context(ctx.recipe)
        prompts = choose_prompts(ctx, tokenizer, drops)
        sample_outputs(ctx, policy, tokenizer, prompts, samples)
        if ctx.stop_requested:
            return {}
        del policy
        if ctx.recipe.rank.labeler == "reward_model" and Path(ctx.recipe.rank.reward_model).exists():
            ctx.use(Path(ctx.recipe.rank.reward_model))
        candidates = distinct_candidates(prompts, samples, drops)
        if not candidates:
            raise UserError(
                "no prompt has two different outputs to rank",
                where="rank",
                fix="raise rank.temperature or rank.outputs_per_prompt, or look at the policy in rank/samples.jsonl",
            )
        people = ctx.recipe.rank.labeler == "human"
        if ctx.recipe.rank.labeler == "judge":
            for path in judge_files(ctx.recipe.judge):
                ctx.use(path)
        found = label_by_people(ctx, candidates) if people else label(ctx, candidates, drops)
        if found is None:
            return {}
        ranked = found
        tokens = samples.tokens(prompts)
    show_drops(drops.table())
    if not ranked.rankings:
        raise UserError(
            "no ranking is left", where=f"rank.labeler={ctx.recipe.rank.labeler}", fix="see the drops above"
        )
    phase("save")
    return write(ctx, ranked, drops, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("rank", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
