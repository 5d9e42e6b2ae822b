"""Sample K outputs per prompt from the SFT policy and rank them (paper, section 3.4): `python stages/rank.py RECIPE`.

prompts   choose those within the length limit, in the order of their hash; the first rank.prompts of them
sample    sample K outputs each, in chunks that are kept as they come (rank/samples.jsonl): an interruption loses one
clean     drop empty outputs and keep identical ones once; a prompt needs two outputs
label     rank them. The simulated labeler gets the noise with which two labelers agree on rank.agreement of the pairs;
          with rank.labeler=human the stage serves the labelling page and waits until enough rankings are in
write     write rank/rankings.jsonl for the reward stage, rank/summary.json for people and for evaluate

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

from rlhf.data.chat_template import stop_ids
from rlhf.data.encoding import Encoded, fit_prompts
from rlhf.data.records import Drops, Prompt, read_prompts, read_rankings
from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed
from rlhf.labeling.judge.judge import warn_if_over_context
from rlhf.labeling.judge.labeler import JudgeLabeler
from rlhf.labeling.labelers import labeler_files, make_labeler
from rlhf.labeling.outputs import Outputs, RankResult, SampledOutputs
from rlhf.labeling.page.collect import rankings_by_people
from rlhf.labeling.rubric_labeler import calibrated_noise, rubric_scores, second_opinion
from rlhf.labeling.summary import SAMPLE_COLUMNS, sample_rows, show_example, summarise, write_rankings
from rlhf.models.loading import load_tokenizer
from rlhf.models.zero import load_frozen_policy
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.run.fingerprints import counts
from rlhf.run.stage import StageContext, run_stage
from rlhf.system.console import Progress, console, show_drops
from rlhf.system.phases import phase

TABLE_ROWS = 64


def choose_prompts(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, drops: Drops) -> list[Encoded[Prompt]]:
    """Return the prompts to rank, encoded, in an order that depends on their text alone.

    Raises UserError if no prompt is within the length limit.
    """
    recipe, count = ctx.recipe, ctx.recipe.rank.prompts
    prompts = read_prompts(recipe.data.prompts, drops)
    short = fit_prompts(prompts, tokenizer, recipe.data.max_prompt_tokens, drops)
    chosen = sorted(short, key=lambda encoded: encoded.item.key)[: count or None]
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
    """Add K outputs for each prompt to `samples`; return early, between chunks, when a stop is requested.

    A chunk is kept or sampled whole, so that an interrupted run decodes the same batches as an uninterrupted one.
    """
    recipe, cfg = ctx.recipe, ctx.recipe.rank
    k, size = cfg.outputs_per_prompt, max(1, cfg.batch_size // cfg.outputs_per_prompt)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    kept = [encoded.item for chunk in chunks if samples.has_all(items(chunk)) for encoded in chunk]
    tokens = samples.tokens(kept)
    ctx.tracker.truncate_after(tokens, again=("rank/prompts", "samples"))
    params = SamplingParams(
        max_new_tokens=recipe.data.max_response_tokens,
        temperature=cfg.temperature,
        stop_ids=stop_ids(tokenizer, policy),
        batch_size=cfg.batch_size,
    )
    with Progress("rank: sampling", total=len(prompts) * k, unit="outputs", initial=len(kept) * k) as progress:
        for index, chunk in enumerate(chunks):
            if ctx.stop_requested:
                return
            if samples.has_all(items(chunk)):
                continue
            begin = time.perf_counter()
            phase("rollout", index)
            rollout = sample(
                policy,
                tokenizer,
                [encoded.prompt for encoded in chunk for _ in range(k)],
                params,
                seeds=[row_seed(recipe.run.seed, "rank", encoded.item.key, i) for encoded in chunk for i in range(k)],
                advance=progress.advance,
            )
            seconds = time.perf_counter() - begin
            lengths, finished = rollout.lengths.tolist(), rollout.finished.tolist()
            tokens += sum(lengths)
            log_chunk(ctx, lengths, finished, seconds, tokens)
            samples.add(items(chunk), rollout.texts(tokenizer), finished, lengths)


def log_chunk(ctx: StageContext, lengths: list[int], finished: list[bool], seconds: float, step: int) -> None:
    """Log the metrics of a chunk, and write them to disk before its samples.

    After an interruption in between, the chunk is sampled again and its metrics are replaced. In the other order the
    metrics would be missing for good.
    """
    metrics = {
        "rank/finished_fraction": float(np.mean(finished)),
        "rank/response_length": float(np.mean(lengths)),
        "perf/rollout_tokens_per_s": sum(lengths) / seconds,
    }
    ctx.tracker.log(metrics, step)
    ctx.tracker.flush()


def items(prompts: Sequence[Encoded[Prompt]]) -> list[Prompt]:
    """Return the prompts without their token ids."""
    return [encoded.item for encoded in prompts]


def distinct_outputs(prompts: Sequence[Prompt], samples: SampledOutputs, drops: Drops) -> list[Outputs]:
    """Return the distinct outputs of each prompt that has at least two; `drops` counts the others.

    Raises UserError if no prompt has two.
    """
    found = []
    for prompt in prompts:
        outputs = samples.of(prompt).distinct(drops)
        if len(outputs.responses) > 1:
            found.append(outputs)
        else:
            drops.add("prompt with fewer than two distinct outputs")
    if not found:
        fix = "raise rank.temperature or rank.outputs_per_prompt, or look at the policy in rank/samples.jsonl"
        raise UserError("no prompt has two different outputs to rank", "rank", fix)
    return found


def label(ctx: StageContext, outputs: Sequence[Outputs], drops: Drops) -> RankResult | None:
    """Rank every prompt's outputs by rubric, reward model or judge; return None when a stop is requested.

    The rubric's noise is calibrated first, and a second labeler with other noise is compared at the end. After a stop,
    the answers of a judge are found in its log, and other labelers begin again.
    """
    recipe, name = ctx.recipe, ctx.recipe.rank.labeler
    summary: dict[str, Any] = calibrated_noise(outputs, recipe.rank) if name == "rubric" else {"noise_sigma": 0.0}
    labeler = make_labeler(name, recipe, ctx.run, summary["noise_sigma"], ctx.dir / "judge.jsonl")
    if isinstance(labeler, JudgeLabeler):
        outputs = labeler.drop_too_long(outputs, drops)
    kept, rankings = [], []
    phase("score")
    with Progress("rank: labelling", total=len(outputs), unit="prompts") as progress:
        for each in outputs:
            if ctx.stop_requested:
                return None
            if isinstance(labeler, JudgeLabeler) and not labeler.all_answered(each.prompt, each.outputs):
                drops.add("question that the judge's endpoint refuses as too long")
            else:
                rankings.append(each.ranked(labeler.rank(each.prompt, each.outputs, recipe.run.seed)))
                kept.append(each)
            progress.advance(1)
    if name == "rubric":
        summary |= second_opinion(labeler, kept, rankings, recipe.run.seed)
    elif isinstance(labeler, JudgeLabeler):
        summary |= labeler.summary()
    return RankResult(rankings, [each.lengths for each in kept], summary)


def write(ctx: StageContext, result: RankResult, drops: Drops, step: int) -> dict[str, float]:
    """Write the stage's files, log its metrics and samples, print an example; return the metrics."""
    scores = [rubric_scores(ranking) for ranking in result.rankings]
    summary = {"labeler": ctx.recipe.rank.labeler} | summarise(result) | {"drops": dict(drops.table())}
    metrics = write_rankings(ctx.dir, result, scores, summary)
    ctx.tracker.log(metrics, step)
    ctx.tracker.table("samples", SAMPLE_COLUMNS, sample_rows(result.rankings, scores)[:TABLE_ROWS], step)
    show_example(result.rankings, scores)
    return metrics


def fingerprint(ctx: StageContext, sft_dir: Path) -> str:
    """Return a hash of what the samples depend on besides the prompt: the policy's files and the sampling settings."""
    ctx.use(sft_dir)
    recipe, cfg = ctx.recipe, ctx.recipe.rank
    parts = [
        sorted(ctx.inputs.items()),
        {key: value for key, value in recipe.model.model_dump().items() if counts(f"model.{key}", value)},
        [recipe.run.seed, cfg.outputs_per_prompt, cfg.temperature, cfg.batch_size, recipe.data.max_response_tokens],
    ]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def run(ctx: StageContext) -> dict[str, Any]:
    """Run the stage from prompts to rankings; return its metrics, or {} when a stop is requested."""
    drops, labeler = Drops(), ctx.recipe.rank.labeler
    if labeler == "file":
        rankings, tokens = read_rankings(ctx.recipe.data.rankings, drops), 0
        result: RankResult | None = RankResult(rankings, [], {"noise_sigma": 0.0})
    else:
        sft_dir = ctx.run.require("sft", "model")
        samples = SampledOutputs(ctx.dir / "samples.jsonl", fingerprint(ctx, sft_dir))
        tokenizer = load_tokenizer(sft_dir, ctx.recipe.model)
        policy = load_frozen_policy(ctx.recipe, ctx.device, sft_dir, tokenizer)
        if labeler == "judge":
            warn_if_over_context(ctx.recipe)
        prompts = choose_prompts(ctx, tokenizer, drops)
        sample_outputs(ctx, policy, tokenizer, prompts, samples)
        if ctx.stop_requested:
            return {}
        del policy
        outputs = distinct_outputs(items(prompts), samples, drops)
        for path in labeler_files(labeler, ctx.recipe):
            ctx.use(path)
        result = rankings_by_people(ctx, outputs) if labeler == "human" else label(ctx, outputs, drops)
        tokens = samples.tokens(items(prompts))
    if result is None:
        return {}
    show_drops(drops.table())
    if not result.rankings:
        raise UserError("no ranking is left", where=f"rank.labeler={labeler}", fix="see the drops above")
    phase("save")
    return write(ctx, result, drops, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage from the command line."""
    return run_stage("rank", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
