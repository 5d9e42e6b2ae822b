"""The stages as one table: the program, inputs, product and metrics of each. All other code looks them up here."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Reads(NamedTuple):
    """Inputs that a stage's result depends on, besides the recipe fields that every stage reads."""

    recipe: tuple[str, ...]  # sections or fields of the recipe
    data: tuple[str, ...]  # fields of the recipe's `data` section, which name files
    upstream: tuple[str, ...] = ()  # paths in the run folder


class Stage(NamedTuple):
    """A row of the table: one stage of a run."""

    name: str  # its folder in the run, and its name in `run.stages`
    program: str  # the module stages.PROGRAM
    label: str  # in tables and on charts
    level: int  # a stage needs the lower levels; stages of one level need nothing of each other
    reads: Reads
    headlines: tuple[tuple[str, ...], ...]  # metrics that summarise it: of each group the first one that was logged
    product: str = "model"  # file or folder that shows that the stage is complete
    axis: Literal["tokens", "episodes"] = "tokens"  # x axis of its metrics
    may_change: tuple[str, ...] = ()  # fields that may change while the stage is interrupted: no checkpoint needs them


_JUDGE = tuple(
    f"judge.{name}"
    for name in (
        *("model", "endpoint", "template", "demonstrations", "shots", "tie_margin", "calibrate"),
        *("reasoning_tokens", "max_tokens", "top_logprobs"),
    )
)
_PPO = Stage(
    "ppo",
    program="ppo",
    label="PPO",
    level=3,
    reads=Reads(("ppo", "reward.peft", "reward.train"), ("prompts", "pretraining"), ("sft/model", "reward/model")),
    headlines=(("ppo/reward_score",), ("ppo/kl",)),
    axis="episodes",
    may_change=tuple(
        f"ppo.{name}"
        for name in (
            *("save_every", "samples_logged", "micro_batch_size", "score_tokens", "rollout_batch_size", "episodes"),
            *("lr", "value_lr", "kl_coef", "max_kl", "clip", "value_clip", "vf_coef", "gamma", "lam"),
            *("missing_eos_penalty", "max_skipped_steps", "ratio_tolerance"),
        )
    ),
)
PPO_VARIANTS = ("ppo-ptx", "ppo")  # the default first
CHECKPOINTS_KEPT = 2  # sealed checkpoints that a stage keeps: if one is damaged, the one before remains

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "sft",
            program="sft",
            label="SFT",
            level=0,
            reads=Reads(("sft",), ("demonstrations", "pretraining")),
            headlines=(("sft/validation_loss", "sft/loss"),),
        ),
        Stage(
            "rank",
            program="rank",
            label="rank",
            level=1,
            reads=Reads(
                ("rank", *_JUDGE, "label.rankings", "label.overlap", "label.opinions"),
                ("prompts", "rankings"),
                ("sft/model",),
            ),
            headlines=(("rank/agreement", "rank/finished_fraction"), ("rank/tie_fraction",)),
            product="rankings.jsonl",
        ),
        Stage(
            "reward",
            program="reward",
            label="reward",
            level=2,
            reads=Reads(
                ("reward", "rank.labeler"), ("demonstrations", "rankings"), ("sft/model", "rank/rankings.jsonl")
            ),
            headlines=(("reward/accuracy", "reward/train_accuracy"),),
            may_change=("reward.save_every", "reward.micro_tokens", "reward.lr"),
        ),
        _PPO,
        _PPO._replace(name="ppo-ptx", label="PPO-ptx"),
        Stage(
            "evaluate",
            program="evaluate",
            label="evaluate",
            level=4,
            reads=Reads(
                ("evaluate", "rank", "reward.train", *_JUDGE)
                + ("ppo.ptx_tokens", "ppo.score_tokens", "ppo.rollout", "ppo.rollout_batch_size"),
                ("prompts_heldout", "pretraining_heldout", "cloze", "prompts", "demonstrations", "rankings")
                + ("pretraining",),
                ("sft/model", "rank/summary.json", "reward/model")
                + tuple(f"{variant}/{what}" for variant in PPO_VARIANTS for what in ("model", "ema")),
            ),
            headlines=(tuple(f"evaluate/win_rate/{variant}" for variant in PPO_VARIANTS),),
            product="results.json",
        ),
    )
}
TRAINED = tuple(stage.name for stage in STAGES.values() if stage.product == "model")  # stages that leave a model


def is_ppo(stage: str) -> bool:
    """Return whether a stage is one of the variants of PPO."""
    return stage in PPO_VARIANTS
