"""What the embedded data does to the embedded model.

    python tests/tools/data_measure.py cloze|sft|rewards [--runs FOLDER]

    cloze    accuracy of the model as shipped on cloze.jsonl, and again with the choices shuffled
    sft      loss on held-out demonstrations before and after the SFT stage
    rewards  held-out pair accuracy of reward models trained on rankings.jsonl by the reward stage (5 folds by prompt, 3
             seeds), against what length alone and position alone give on the same pairs

Prints the tables that data/README.md quotes. `rewards` trains 15 models of about five minutes each on two CPU cores.
What is done is skipped when it is started again. Arguments after `--` go to the stages: `-- reward.keep_layers=12`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this program is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlhf.data.encoding import fit_rankings
from rlhf.data.records import Drops, Ranking, ranking_row, read_cloze, read_rankings, write_jsonl
from rlhf.evaluation.alignment_tax import cloze_accuracy
from rlhf.functional.ranking import PairCounts, accuracy_interval, count_pairs, ordered_pairs
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rlhf.system.console import Progress, table
from rlhf.training.ranking_metrics import pair_counts
from rlhf.training.ranking_passes import Group
from support.paths import ROOT

FOLDS, SEEDS, SHUFFLES = 5, (1, 2, 3), 3
# 125 prompts are few: the demo's first 8 layers and 16 steps learn next to nothing from them.
# The first 16 layers of the SFT model are the embedded model's own, for the demo's adapters sit on the last 10 of 30.
REWARD = ["reward.model=smollm2-135m", "reward.keep_layers=16", "reward.peft.method=model", "model.peft.last_layers=6"]
REWARD += ["reward.lr=1e-3", "reward.epochs=2", "reward.batch_size=4"]
# Longer than the demo's limits: the data set is judged whole.
LIMITS = ["data.max_prompt_tokens=192", "data.max_response_tokens=224", "sft.max_tokens=416", "reward.max_tokens=416"]


def measure_cloze() -> None:
    """The embedded model's accuracy, with the choices as they are and in other orders."""
    tokenizer = load_tokenizer("smollm2-135m")
    model = load_policy("smollm2-135m", ModelSection(), tokenizer=tokenizer).eval()
    questions = read_cloze(["embedded:cloze"])
    rows = []
    for shuffle in range(SHUFFLES + 1):
        asked = questions
        if shuffle:
            rng = random.Random(shuffle)
            orders = [rng.sample(range(len(q.choices)), len(q.choices)) for q in questions]
            asked = [
                replace(q, choices=tuple(q.choices[i] for i in order), answer=order.index(q.answer))
                for q, order in zip(questions, orders, strict=True)
            ]
        with Progress("cloze", total=sum(len(q.choices) for q in asked), unit="choices") as progress:
            result = cloze_accuracy(model, tokenizer, asked, advance=progress.advance)
        choices = f"shuffled, seed {shuffle}" if shuffle else "as written"
        rows.append([choices, result.n, *result.accuracy, result.accuracy_sum.mean])
    table("cloze accuracy (chance 0.25)", ["choices", "questions", "per byte", "low", "high", "summed"], rows)


def stage(name: str, run: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Run a stage of the demo recipe in a process of its own; returns its metrics."""
    settings = [f"run.dir={run.parent}", f"run.name={run.name}", "tracking.wandb=disabled", *LIMITS, *arguments]
    subprocess.run([sys.executable, str(ROOT / "stages" / f"{name}.py"), "demo", *settings], check=True)
    return json.loads((run / name / "stage.json").read_text())["metrics"]


def measure_sft(runs: Path, arguments: Sequence[str]) -> None:
    """Held-out demonstration loss before and after SFT, for every seed: another split, another order."""
    rows, keys = [], ("heldout_demonstrations", "validation_loss_before", "validation_loss")
    for seed in SEEDS:
        metrics = stage("sft", runs / f"sft-seed{seed}", [f"run.seed={seed}", *arguments])
        rows.append([seed, *(metrics[f"sft/{key}"] for key in keys)])
    table("loss on held-out demonstrations, nats per token", ["seed", "held out", "before", "after"], rows)


def length_scores(train: Sequence[Ranking], test: Sequence[Ranking]) -> list[list[float]]:
    """What length alone can do: longer is better, or shorter is, whichever the training pairs say."""
    pairs = [(r.responses[i].split(), r.responses[j].split()) for r in train for i, j in ordered_pairs(r.ranks)]
    longer = sum(np.sign(len(better) - len(worse)) for better, worse in pairs)
    sign = 1.0 if longer >= 0 else -1.0
    return [[sign * len(text.split()) for text in r.responses] for r in test]


def position_scores(train: Sequence[Ranking], test: Sequence[Ranking]) -> list[list[float]]:
    """What position alone can do: each position's share of training pairs won."""
    won, played = defaultdict(float), defaultdict(float)
    for r in train:
        for i, j in ordered_pairs(r.ranks):
            won[i] += 1
            played[i] += 1
            played[j] += 1
    share = {position: won[position] / played[position] for position in played}
    return [[share.get(i, 0.5) for i in range(len(r.ranks))] for r in test]


def folds(rankings: Sequence[Ranking], seed: int) -> list[list[Ranking]]:
    """The prompts in FOLDS parts whose sizes differ by one at most."""
    order = list(rankings)
    random.Random(seed).shuffle(order)
    return [order[i::FOLDS] for i in range(FOLDS)]


def mean_counts(counts: Sequence[PairCounts]) -> PairCounts:
    """One prompt's counts over the seeds: its pairs once, its correct pairs on average."""
    return PairCounts(float(np.mean([c.correct for c in counts])), counts[0].pairs, [])


def measure_rewards(runs: Path, arguments: Sequence[str]) -> None:
    """Every prompt is held out once a seed; intervals are over prompts, of the mean over seeds."""
    rankings = read_rankings(["embedded:rankings"], Drops())
    found: dict[str, dict[str, list[PairCounts]]] = defaultdict(lambda: defaultdict(list))
    rows = []
    for seed in SEEDS:
        parts = folds(rankings, seed)
        for fold, test in enumerate(parts):
            train = [r for part in parts if part is not test for r in part]
            run = runs / f"rewards-seed{seed}-fold{fold}"
            run.mkdir(parents=True, exist_ok=True)
            write_jsonl(run / "train.jsonl", [ranking_row(r) for r in train])
            own = ["rank.labeler=file", f"data.rankings=[{run / 'train.jsonl'}]", "data.validation_fraction=0"]
            stage("reward", run, [*own, f"run.seed={seed}", "reward.save_every=0", *REWARD, *arguments])
            folder = run / "reward" / "model"
            model, tokenizer = load_reward_model(folder, ModelSection()), load_tokenizer(str(folder))
            fitted = fit_rankings(test, tokenizer, 4096, Drops())
            groups = [Group([(f.prompt, ids) for ids in f.responses], f.item.ranks) for f in fitted]
            counted = pair_counts(model, groups)
            scored = {"length alone": length_scores(train, test), "position alone": position_scores(train, test)}
            for i, ranking in enumerate(test):
                found["reward model"][ranking.prompt.key].append(counted[i])
                for name, values in scored.items():
                    found[name][ranking.prompt.key].append(count_pairs(values[i], ranking.ranks))
        of_seed = {name: [c[-1] for c in by_prompt.values()] for name, by_prompt in found.items()}
        rows += [[f"{name}, seed {seed}", *accuracy_interval(counts)] for name, counts in of_seed.items()]
    pooled = {name: [mean_counts(c) for c in by_prompt.values()] for name, by_prompt in found.items()}
    rows += [[f"{name}, mean of seeds", *accuracy_interval(counts)] for name, counts in pooled.items()]
    table("accuracy on held-out pairs, 95 % interval over prompts", ["judge", "accuracy", "low", "high"], rows)
    pairs = sum(c.pairs for c in pooled["reward model"])
    print(f"{len(rankings)} prompts, {pairs} pairs, every prompt held out once a seed")
    for name in ("length alone", "position alone"):
        gain, low, high = difference(pooled["reward model"], pooled[name])
        print(f"reward model less {name}: {gain:+.1%} [{low:+.1%}, {high:+.1%}]")


def difference(a: Sequence[PairCounts], b: Sequence[PairCounts]) -> tuple[float, float, float]:
    """Accuracy of a less that of b on the same prompts, with the 95 % bootstrap interval over prompts."""
    pairs = np.array([c.pairs for c in a], float)
    gain = np.array([x.correct - y.correct for x, y in zip(a, b, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(pairs), (2000, len(pairs)))
    low, high = np.quantile(gain[draws].sum(1) / pairs[draws].sum(1), (0.025, 0.975))
    return float(gain.sum() / pairs.sum()), float(low), float(high)


def main() -> int:
    """Run one of the measurements from the command line."""
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cloze", "sft", "rewards"])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "data", help="where the stages write")
    args = parser.parse_args(argv[:cut])
    if args.what == "cloze":
        measure_cloze()
    else:
        {"sft": measure_sft, "rewards": measure_rewards}[args.what](args.runs, argv[cut + 1 :])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
