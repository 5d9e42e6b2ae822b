"""Every stage on two processes under ZeRO 0 to 3: the same numbers as in one process, from the same inputs.

One process runs all stages; two ranks, started once, then run each stage in every setting from what the one process
left before it. Two more take up copies of the runs that were stopped. `make test-distributed` runs these; they are
marked `distributed`.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from support.distributed_runs import Noted, arguments, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # the first test waits for all runs

STAGES = ("sft", "rank", "reward", "ppo", "evaluate")
FOLDER = {"ppo": "ppo-ptx"}  # where a stage leaves its results, when that is not its own name
TRAINED = ("sft", "reward", "ppo")
OWN = {  # what the runs of one process set
    "one": [],
    "lora": ["model.peft.method=lora", "model.peft.rank=4"],
    "prefix": ["model.peft.method=prefix", "sft.packing=false", "sft.epochs=1.7"],
    "adapter": ["model.peft.method=adapter", "model.peft.bottleneck=8"],
    "bf16": ["model.dtype=bfloat16", "ppo.ratio_tolerance=0.2"],
}
OWN["lora-bf16"] = [*OWN["lora"], *OWN["bf16"]]
STOP_BEFORE = 5  # the optimiser step before which a run is stopped


@dataclass(frozen=True)
class Setting:
    """A way to run a stage on two processes, or on one where `zero` is None."""

    stage: str
    zero: int | None
    like: str = "one"  # the run of one process that it is held against
    more: tuple[str, ...] = ()
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        more = (m.split(".", 1)[1].replace("=", "-") for m in self.more)
        zero = "alone" if self.zero is None else f"zero{self.zero}"
        return "-".join([self.stage, zero, *([] if self.like == "one" else [self.like]), *more])


SETTINGS = [Setting(stage, zero) for zero in (0, 1, 2, 3) for stage in STAGES]
PARTED = ("launch.frozen=partitioned", "launch.gather=by_layer")
SETTINGS += [
    # where models lie that a stage does not train, and how partitioned ones come together
    *(Setting(stage, 3, more=PARTED) for stage in ("rank", "ppo", "evaluate")),
    Setting("ppo", 2, more=("launch.frozen=partitioned",)),
    # micro-batches: a quarter of those above
    Setting("sft", 2, more=("sft.micro_batch_size=1",)),
    Setting("ppo", 1, more=("ppo.micro_batch_size=1",)),
    Setting("ppo", 2, more=("ppo.micro_batch_size=1", "launch.frozen=cpu")),
    Setting("ppo", 3, more=("ppo.micro_batch_size=1", "launch.gradient_checkpointing=true")),
    # and prompts whose outputs are scored first and trained in parts
    *(Setting("reward", zero, more=("reward.micro_tokens=200",)) for zero in (0, 2)),
    Setting("reward", 3, more=("reward.micro_tokens=200", "launch.gradient_checkpointing=true")),
    Setting("sft", 3, more=("launch.gradient_checkpointing=true",)),
    *(Setting("ppo", zero, more=("launch.offload=true",)) for zero in (2, 3)),
    # SFT's Adam makes whole steps of gradients that are all but zero, as the adapters' first are
    Setting("sft", 3, like="lora", more=("launch.gather=by_layer",), tolerance=1e-4),
    *(Setting(stage, 3, like="lora", more=("launch.gather=by_layer",)) for stage in ("reward", "ppo")),
    # PPO's four networks on one base, which ZeRO-3 does not do
    *(Setting("ppo", zero, like="lora", more=("launch.frozen=cpu",)) for zero in (0, 2, 3)),
    # other places for what is trained: keys and values before the rows, maps behind the MLPs
    *(
        Setting(stage, zero, like=like, tolerance=1e-4 if stage == "sft" else 1e-5)
        for like in ("prefix", "adapter")
        for zero in (2, 3)
        for stage in TRAINED
    ),
    # a bfloat16 holds three digits, and adapters are of that type under ZeRO-3 alone
    *(Setting("ppo", zero, like="bf16", more=("model.dtype=bfloat16",), tolerance=5e-3) for zero in (2, 3)),
    *(
        Setting(stage, 3, like="lora-bf16", more=("model.dtype=bfloat16",), tolerance=2e-2)
        for stage in ("sft", "reward")
    ),
    # (not PPO with adapters: rounded to that type, SFT's would give other rollouts from the first token on)
    Setting("ppo", 3, like="bf16", more=("launch.frozen=partitioned",), tolerance=5e-3),
]
# DeepSpeed rounds the policy's adapter to bfloat16: the reference must compute what the policy does all the same.
# Nothing is compared with PPO of one process here, which therefore does not run.
ROUNDED = [
    Setting("ppo", zero, like="lora-bf16", more=(more, "ppo.episodes=48"))
    for more in ("model.dtype=bfloat16", "launch.frozen=partitioned")
    for zero in (2, 3)
]
SPOILED = [Setting("reward", zero) for zero in (0, 1, 2, 3)]  # a loss of one process is infinite, once
RESUMED = [
    *(Setting("ppo", zero) for zero in (0, 1, 2, 3)),
    *(Setting("ppo", zero, more=("launch.offload=true",)) for zero in (2, 3)),
    Setting("ppo", 3, like="lora", more=("launch.gather=by_layer",)),
    *(Setting("ppo", zero, like="bf16", more=("model.dtype=bfloat16",)) for zero in (2, 3)),
    *(Setting("reward", zero) for zero in (0, 2, 3)),
]


@dataclass(frozen=True)
class Change:
    """A stage that is stopped on some processes and taken up with others; None stands for one process."""

    stage: str
    before: int | None  # ZeRO stage of two processes
    after: int | None
    like: str = "one"

    @property
    def begun(self) -> Setting:
        return Setting(self.stage, self.before, self.like)

    @property
    def ended(self) -> Setting:
        return Setting(self.stage, self.after, self.like)

    @property
    def name(self) -> str:
        return f"{self.begun.name}-to-{self.ended.name}"


CHANGES = [
    Change(stage, before, after)
    for stage in ("ppo", "reward")
    for before, after in ((None, 2), (2, None), (None, 3), (3, None), (0, None), (3, 2), (2, 3))
]
CHANGES += [Change("sft", None, 0), Change("sft", 0, None)]
CHANGES += [Change("ppo", before, after, "lora") for before, after in ((None, 3), (3, 2))]  # one base, and three


STOPPED = list(dict.fromkeys([*RESUMED, *(change.begun for change in CHANGES)]))


def job(folder: Path, setting: Setting, name: str, **more: int) -> dict[str, Any]:
    """Return the job that runs a setting under a name."""
    launch = [] if setting.zero is None else ["launch.processes=2", f"launch.zero_stage={setting.zero}"]
    given = arguments(folder, name, *OWN[setting.like], *launch, *setting.more)
    return {"module": f"stages.{setting.stage}", "arguments": given, **more}


def prepared(folder: Path, setting: Setting, name: str, **more: int) -> dict[str, Any]:
    """Return the job of a setting, with the results that its stage starts from in place."""
    for before in STAGES[: STAGES.index(setting.stage)]:
        part = FOLDER.get(before, before)
        shutil.copytree(folder / setting.like / part, folder / name / part)
    return job(folder, setting, name, **more)


def stopped(folder: Path, alone: bool) -> list[dict[str, Any]]:
    """Return the jobs that are stopped: those of one process, or those of two."""
    chosen = [setting for setting in STOPPED if (setting.zero is None) == alone]
    return [prepared(folder, setting, f"stopped-{setting.name}", stop_after=STOP_BEFORE) for setting in chosen]


def taken_up(folder: Path, alone: bool) -> list[dict[str, Any]]:
    """Return the jobs that take up copies of the stopped runs: those of one process, or those of two."""
    both = [(setting, setting, f"resumed-{setting.name}") for setting in RESUMED]
    both += [(change.begun, change.ended, change.name) for change in CHANGES]
    chosen = [each for each in both if (each[1].zero is None) == alone]
    for begun, _, name in chosen:
        shutil.copytree(folder / f"stopped-{begun.name}", folder / name)
    return [job(folder, ended, name) for _, ended, name in chosen]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Noted]]:
    """Return a folder with the runs of one process in OWN and one run for every setting; and what was noted."""
    folder = tmp_path_factory.mktemp("distributed")

    def alone(names: list[str], stages: tuple[str, ...]) -> dict[str, Noted]:
        chosen = [(run, stage) for run in names for stage in stages if (run, stage) != ("lora-bf16", "ppo")]
        jobs = {f"{run}-{stage}": job(folder, Setting(stage, None, run), run) for run, stage in chosen}
        return dict(zip(jobs, run_ranks(list(jobs.values()), folder, processes=1), strict=True))

    found = alone(["one"], STAGES)
    others = [run for run in OWN if run != "one"]
    for run in others:
        shutil.copytree(folder / "one" / "rank", folder / run / "rank")
    with ThreadPoolExecutor() as pool:  # one process leaves a core to others
        for each in pool.map(lambda names: alone(names, TRAINED), (others[::2], others[1::2])):
            found |= each
        jobs = {setting.name: prepared(folder, setting, setting.name) for setting in [*SETTINGS, *ROUNDED]}
        assert len(jobs) == len(SETTINGS) + len(ROUNDED)
        spoiled = [prepared(folder, setting, f"spoiled-{setting.name}", spoil_at=3) for setting in SPOILED]
        begun = pool.submit(run_ranks, stopped(folder, alone=True), folder, processes=1)
        noted = run_ranks([*jobs.values(), *spoiled, *stopped(folder, alone=False)], folder)
        begun.result()
        found |= dict(zip(jobs, noted, strict=False))
        ended = pool.submit(run_ranks, taken_up(folder, alone=True), folder, processes=1)
        run_ranks(taken_up(folder, alone=False), folder)
        ended.result()
    return folder, found


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_in(model: Path) -> dict[str, Tensor]:
    """All of a model folder's weights; of a method's, what was trained."""
    files = list(model.glob("adapter.safetensors")) or list(model.glob("*.safetensors"))
    assert len(files) == 1, files
    return load_file(files[0])


def same_weights(ours: Path, theirs: Path, tolerance: float) -> None:
    weights, expected = weights_in(ours), weights_in(theirs)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # By norm: where a gradient is all but zero, Adam makes a step of the whole rate from its rounding.
        gap = float((weights[name].float() - tensor.float()).norm())
        assert gap <= tolerance * float(tensor.float().norm()) + 1e-7, name


COMPARED = {
    "sft": ("sft/loss", "sft/grad_norm", "sft/validation_loss"),
    "reward": ("reward/loss", "reward/grad_norm", "reward/train_accuracy", "reward/accuracy"),
    "ppo": (
        *("ppo/policy_loss", "ppo/value_loss", "ppo/ptx_loss", "ppo/kl", "ppo/reward_score", "ppo/response_length"),
        *("ppo/grad_norm", "ppo/grad_norm_value"),
    ),
}
MODELS = ("model", "ema")
TRAINING = [setting for setting in SETTINGS if setting.stage in COMPARED]


@pytest.mark.parametrize("setting", TRAINING, ids=lambda s: s.name)
def test_training_gives_the_numbers_of_one_process(runs: tuple[Path, dict[str, Noted]], setting: Setting) -> None:
    where, part = runs[0], FOLDER.get(setting.stage, setting.stage)
    ours, theirs = metrics(where / setting.name / part), metrics(where / setting.like / part)
    assert len(ours) == len(theirs) >= 5
    exact, compared = "bf16" not in setting.like, 0
    # After a step in bfloat16 other samples are drawn; then the final weights alone are compared.
    for a, b in list(zip(ours, theirs, strict=True))[: None if exact else 1]:
        assert a["step"] == b["step"]
        for name in COMPARED[setting.stage]:
            if name in b:
                # KL is what is left of sums of hundreds of nats.
                least = setting.tolerance if name == "ppo/kl" else setting.tolerance / 10
                assert a[name] == pytest.approx(b[name], rel=setting.tolerance, abs=least), name
                compared += 1
    assert compared >= (20 if exact else 2)  # ten optimiser steps or five iterations of PPO
    if setting.stage == "ppo":  # nothing in the average is left as it was: a tied head is no weight of its own
        kept = [weights_in(where / setting.name / part / model).keys() for model in MODELS]
        assert kept[0] == kept[1]
    for model in MODELS if setting.stage == "ppo" else ("model",):
        # An adapter's own weights are small: what is a rounding of the weight that it changes is more of them. They
        # begin at 0, and Adam's first steps have the sizes of the rate whichever bits of a bfloat16 the gradients keep.
        tolerance = setting.tolerance * {"lora": 4, "lora-bf16": 10}.get(setting.like, 1)
        same_weights(where / setting.name / part / model, where / setting.like / part / model, tolerance)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_the_engine_is_the_one_that_was_asked_for(runs: tuple[Path, dict[str, Noted]], setting: Setting) -> None:
    expected = [f"DeepSpeedEngine {setting.zero}"]
    if setting.stage == "sft" and setting.zero == 0:
        expected = ["DistributedDataParallel"]  # TRL's trainer on its own does what ZeRO 0 does
    assert runs[1][setting.name]["engines"] == (expected if setting.stage in COMPARED else [])


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.stage == "ppo"], ids=lambda s: s.name)
def test_rollouts_are_those_of_one_process_token_for_token(
    runs: tuple[Path, dict[str, Noted]], setting: Setting
) -> None:
    ours, theirs = (runs[1][name]["rollouts"] for name in (setting.name, f"{setting.like}-ppo"))
    assert [len(rows) for rows in theirs] == [16] * 5
    if "bf16" in setting.like:
        ours, theirs = ours[:1], theirs[:1]
    assert ours == theirs


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.stage in ("rank", "evaluate")], ids=lambda s: s.name)
def test_samples_do_not_depend_on_the_number_of_processes(
    runs: tuple[Path, dict[str, Noted]], setting: Setting
) -> None:
    def rows(path: Path, *fields: str) -> list[list]:
        return [[row[f] for f in fields] for row in map(json.loads, path.read_text().splitlines())]

    files = {
        "rank": {"rank/samples.jsonl": ("prompt", "responses"), "rank/rankings.jsonl": ("prompt", "ranks")},
        "evaluate": {"evaluate/samples.jsonl": ("prompt", "responses", "wins_over_sft")},
    }[setting.stage]
    for file, fields in files.items():
        expected = rows(runs[0] / "one" / file, *fields)
        assert len(expected) >= 7
        assert rows(runs[0] / setting.name / file, *fields) == expected


@pytest.mark.parametrize("setting", ROUNDED, ids=lambda s: s.name)
def test_kl_begins_at_0_with_adapters_in_bfloat16(runs: tuple[Path, dict[str, Noted]], setting: Setting) -> None:
    rows = metrics(runs[0] / setting.name / "ppo-ptx")
    assert rows[0]["ppo/kl"] == pytest.approx(0.0, abs=1e-6)
    assert any(abs(row["ppo/kl"]) > 1e-3 for row in rows[1:])


@pytest.mark.parametrize("setting", SPOILED, ids=lambda s: s.name)
def test_an_infinite_loss_on_one_process_skips_the_step_on_all(
    runs: tuple[Path, dict[str, Noted]], setting: Setting
) -> None:
    folder = runs[0] / f"spoiled-{setting.name}" / "reward"
    both = (metrics(folder), metrics(runs[0] / "one" / "reward"))
    norms, expected = ([row["reward/grad_norm"] for row in rows if "reward/grad_norm" in row] for rows in both)
    assert len(norms) == len(expected)
    assert [i for i, norm in enumerate(norms) if norm is None] == [2]  # the third; JSON has no infinity
    assert norms[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert all(tensor.isfinite().all() for tensor in weights_in(folder / "model").values())


@pytest.mark.parametrize("setting", RESUMED, ids=lambda s: s.name)
def test_a_stopped_run_goes_on_to_the_same_bits(runs: tuple[Path, dict[str, Noted]], setting: Setting) -> None:
    where = runs[0]
    part = FOLDER.get(setting.stage, setting.stage)
    straight, resumed = where / setting.name / part, where / f"resumed-{setting.name}" / part
    record = json.loads((resumed / "stage.json").read_text())
    assert (record["state"], record["attempts"]) == ("done", 2)
    for model in MODELS if setting.stage == "ppo" else ("model",):
        same_weights(resumed / model, straight / model, 0.0)
    for a, b in zip(metrics(resumed), metrics(straight), strict=True):
        ours, theirs = ({k: v for k, v in row.items() if k.startswith(("ppo/", "reward/"))} for row in (a, b))
        assert ours == theirs


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.name)
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    runs: tuple[Path, dict[str, Noted]], change: Change
) -> None:
    where, part = runs[0], FOLDER.get(change.stage, change.stage)
    ours, theirs = where / change.name / part, where / change.like / part
    record = json.loads((ours / "stage.json").read_text())
    assert (record["state"], record["attempts"]) == ("done", 2)
    for a, b in zip(metrics(ours), metrics(theirs), strict=True):
        assert a["step"] == b["step"]
        for name in COMPARED[change.stage]:
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5 if name == "ppo/kl" else 1e-6), name
    for model in MODELS if change.stage == "ppo" else ("model",):
        same_weights(ours / model, theirs / model, 1e-5)


def test_uneven_shares_neither_hang_nor_change_a_sample(tmp_path: Path) -> None:
    """Responses of 1 token on one process and 128 on the other, an empty share, a count that does not divide."""
    ways = [("once", "whole"), ("once", "partitioned"), ("by_layer", "partitioned"), ("once", "cpu")]
    jobs = [
        {"module": "support.uneven_rows", "arguments": [str(tmp_path / f"{gather}-{where}.json"), gather, where]}
        for gather, where in ways
    ]
    run_ranks(jobs, tmp_path)
    alone = tmp_path / "alone.json"
    run_ranks([{"module": "support.uneven_rows", "arguments": [str(alone), "once", "whole"]}], tmp_path, processes=1)
    expected = json.loads(alone.read_text())
    lengths = [len(row) for row in expected["1 and 128 tokens"]]
    assert lengths == [1, 128] * 4
    assert [len(row) for row in expected["an empty share"]] == [128]
    for gather, where in ways:
        found = json.loads((tmp_path / f"{gather}-{where}.json").read_text())
        for case, rows in found.items():
            if case.startswith("scores"):
                for a, b in zip(rows, expected[case], strict=True):
                    assert a == pytest.approx(b, abs=1e-5)
            else:
                assert rows == expected[case], (gather, where, case)
