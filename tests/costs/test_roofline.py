"""What passes cost, the least that phases could take, how they are measured, and `rlhf profile` over a real run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from typer.testing import CliRunner

from launch.cli import app
from launch.commands import profile
from rlhf.config import ModelSection, PeftSection
from rlhf.costs.roofline import mean_row, phase_costs, worst_phase
from rlhf.errors import UserError
from rlhf.models.flops import PassSize, model_cost, pass_size
from rlhf.models.loading import load_policy, new_reward_model
from rlhf.models.peft.methods import add_adapter
from rlhf.rollout.batches import build_batch
from rlhf.rollout.scoring import response_logprobs
from rlhf.system import machine, phase_timer
from rlhf.system.phase_timer import PhaseTimer
from rlhf.system.phases import now
from rlhf.training import ppo_metrics
from rlhf.training.ppo_metrics import decoding_costs
from stages import ppo, rank, reward, sft

CPU = torch.device("cpu")
# The tiny Llama: queries and output 64 x 64, keys and values 64 x 32, three matrices of 64 x 176, in four layers.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176
LAYERS, HEAD, QUERIES = 4 * LAYER, 1024 * 64, 4 * 64
ROWS = [(3, 5), (2, 4)]  # 8 and 6 tokens: 14, of which 9 of responses; 36 + 21 pairs that see one another
FORWARD = 2 * (LAYERS * 14 + HEAD * 9) + 4 * QUERIES * 57


def lora(policy: PreTrainedModel, last_layers: int) -> torch.nn.Module:
    return add_adapter(policy, PeftSection(method="lora", rank=4, last_layers=last_layers))


def test_flops_of_the_tiny_model_by_hand(tiny_policy: PreTrainedModel) -> None:
    assert pass_size(ROWS) == PassSize(14, 9, 57)
    cost = model_cost(tiny_policy)
    assert cost.forward(pass_size(ROWS)) == FORWARD == 6398976
    assert cost.training(pass_size(ROWS)) == 3 * FORWARD  # every matrix is trained, and passes the gradient on
    assert cost.weight_bytes == 4 * (LAYERS + HEAD)
    assert cost.kv_bytes == 2 * 4 * 32 * 4  # keys and values, layers, their channels, bytes
    assert cost.parameters == LAYERS + HEAD + 4 * 2 * 64 + 64 and cost.gradient_bytes == 4 * cost.parameters
    frozen = model_cost(tiny_policy.requires_grad_(False))
    assert frozen.forward(pass_size(ROWS)) == FORWARD and frozen.backward(pass_size(ROWS)) == 0


def test_flops_of_adapters_by_hand(tiny_policy: PreTrainedModel) -> None:
    """Rank 4 on seven matrices of the last two layers: 4 x (in + out) weights each, all of them trained."""
    adapters = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 176))
    policy = lora(tiny_policy, 2)
    cost = model_cost(policy)
    assert cost.forward(pass_size(ROWS)) == FORWARD + 2 * adapters * 14
    # The gradient ends at the first adapter: neither the matrix beside it nor its own first factor pass it on.
    passed = 2 * LAYER - 64 * 64 + adapters - 4 * 64
    assert cost.backward(pass_size(ROWS)) == 2 * ((passed + adapters) * 14 + HEAD * 9) + 8 * (2 * 64) * 57
    assert cost.parameters == adapters


def test_a_reward_model_has_a_head_of_one_row(tiny_dir: str) -> None:
    model = new_reward_model(tiny_dir, ModelSection(name="tiny"), keep_layers=3)
    assert model_cost(model).forward(PassSize(14, 2, 57)) == 2 * (3 * LAYER * 14 + 64 * 2) + 4 * 3 * 64 * 57
    cost = model_cost(add_adapter(model, PeftSection(method="lora", rank=4)))
    assert (cost.head, cost.head_trained) == (64, 64)  # the head is trained beside the adapters


@pytest.mark.parametrize("last_layers", [None, 0, 2])
def test_flops_are_those_that_pytorch_counts(tiny_dir: str, last_layers: int | None) -> None:
    policy: Any = load_policy(tiny_dir, ModelSection(name="tiny", attention="eager"))
    if last_layers is not None:
        policy = lora(policy, last_layers)
    rows, length = 2, 48
    lengths = [(16, length - 16)] * rows
    batch = build_batch([([7] * p, [9] * r) for p, r in lengths], 0)
    cost = model_cost(policy)
    # Eager attention computes the whole square, of which half is masked away: that half is no work of the model.
    masked = rows * (length**2 - length * (length + 1) / 2)
    with FlopCounterMode(display=False) as forward:
        logprobs, _ = response_logprobs(policy, batch, 1.0, chunks=1)
    ours = cost.forward(pass_size(lengths)) + 4 * cost.attention * masked
    assert ours == pytest.approx(forward.get_total_flops(), rel=0.005)
    with FlopCounterMode(display=False) as backward:
        logprobs.sum().backward()
    ours = cost.backward(pass_size(lengths)) + 8 * cost.attention_through * masked
    # What `model_cost` says of keys and values beside the first adapter: their matrices and adapters' first factors.
    ours -= 0 if last_layers is None else 2 * rows * length * (2 * 64 * 32 + 2 * 4 * 64)
    assert ours == pytest.approx(backward.get_total_flops(), rel=0.005)


def test_what_sampling_needs_by_hand(tiny_policy: PreTrainedModel) -> None:
    """Batches of two by length of the prompt: one prompt twice, with responses of 3 and 4 tokens; then one of 1."""
    pairs = [([5, 6], [1, 1, 1]), ([7, 8, 9], [1]), ([5, 6], [1, 1, 1, 1])]
    needs = decoding_costs(model_cost(tiny_policy), pairs, batch_size=2)
    assert needs["perf/decode_steps"] == 3 + 0 and needs["perf/decode_rows"] == 2 + 3 + 0
    assert needs["perf/prefill_tokens"] == 2 + 3
    seen = (3 + 4) + (3 + 4 + 5)  # after a prompt of 2: by the tokens that go through one at a time
    weights = 4 * (LAYERS + HEAD)
    assert needs["perf/flops_decode"] == 2 * (LAYERS + HEAD) * 5 + 4 * QUERIES * seen
    assert needs["perf/bytes_decode"] == 3 * weights + seen * 1024
    assert needs["perf/flops_prefill"] == 2 * (LAYERS * 5 + HEAD * 2) + 4 * QUERIES * (3 + 6)
    assert needs["perf/bytes_prefill"] == 2 * weights


def test_floors_by_hand() -> None:
    """At 100 FLOP/s and 10 bytes per second."""
    row = {
        "perf/peak_flops": 100.0, "perf/bandwidth": 10.0, "perf/seconds_rollout": 12.0, "perf/seconds_train": 6.0,
        "perf/seconds_optimizer": 2.0, "perf/seconds_ptx": 0.0, "perf/seconds_other": 5.0,
        "perf/flops_prefill": 100.0, "perf/bytes_prefill": 5.0, "perf/flops_decode": 50.0, "perf/bytes_decode": 20.0,
        "perf/flops_train": 400.0, "perf/bytes_train": 10.0, "perf/bytes_optimizer": 1.0,
        "memory/train_gb": 3.0, "perf/padding_train": 0.25, "perf/train_tokens_per_s": 7.0,
    }  # fmt: skip
    costs = {cost.name: cost for cost in phase_costs(row)}
    assert list(costs) == ["rollout", "train", "optimizer", "other"]  # no pretraining, nothing saved
    sampling = costs["rollout"]
    assert [(f.part, f.seconds, f.limited_by) for f in sampling.floors] == [
        ("prefill", 1.0, "arithmetic"), ("decode", 2.0, "bandwidth"),
    ]  # fmt: skip
    assert (sampling.floor, sampling.times_floor, sampling.share) == (3.0, 4.0, 12 / 25)
    assert (costs["train"].floor, costs["train"].times_floor) == (4.0, 1.5)
    assert (costs["train"].peak_gb, costs["train"].padding, costs["train"].tokens_per_s) == (3.0, 0.25, 7.0)
    assert costs["optimizer"].floor == 0.1 and costs["other"].floor is None
    assert worst_phase(list(costs.values())) is sampling  # 9 s above it, though the optimiser takes 20 times its floor
    without = {name: value for name, value in row.items() if name != "perf/peak_flops"}
    assert worst_phase(phase_costs(without)) is None


def test_iterations_are_averaged_and_memory_is_the_largest() -> None:
    rows = [{"perf/mfu": 0.2, "memory/peak_gb": 1.0, "axis": "episodes"}, {"perf/mfu": 0.4, "memory/peak_gb": 3.0}]
    assert mean_row([*rows, {"perf/mfu": None}]) == {"perf/mfu": pytest.approx(0.3), "memory/peak_gb": 3.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The clock of PhaseTimes, which stands still; call it to let seconds pass. Memory peaks at 2, then 3 GB, ..."""
    now, peaks = [0.0], iter([2.0, 3.0, 1.0, 9.0])
    monkeypatch.setattr(phase_timer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(phase_timer, "reset_peak", lambda device: True)
    monkeypatch.setattr(phase_timer, "recent_peak_gb", lambda device: next(peaks))

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_phases_add_up_to_the_time_that_passed(clock: Callable[[float], None]) -> None:
    times = PhaseTimer(CPU, ("rollout", "train", "ptx"))
    with times("rollout"):
        clock(4.0)
    clock(0.5)
    for _ in range(2):
        with times("train"):
            clock(3.0)
            build_batch([([1, 2], [3]), ([1], [2])], 0)  # five tokens in six places
    build_batch([([1], [2])], 0)  # of no phase
    clock(0.5)
    found = times.collect().metrics()
    assert found == {
        "perf/seconds_rollout": 4.0, "perf/seconds_train": 6.0, "perf/seconds_ptx": 0.0, "perf/seconds_other": 1.0,
        "memory/rollout_gb": 2.0, "memory/train_gb": 3.0, "perf/padding_train": pytest.approx(1 / 6),
    }  # fmt: skip
    with times("train"):
        clock(1.0)
    again = times.collect().metrics()
    assert (again["perf/seconds_train"], again["memory/train_gb"], again["perf/seconds_other"]) == (1.0, 9.0, 0.0)


def test_the_time_begins_with_the_first_phase_and_a_phase_is_announced(clock: Callable[[float], None]) -> None:
    times = PhaseTimer(CPU)
    clock(5.0)
    with times("train", 3):
        clock(1.0)
        assert (now.phase, now.step) == ("train", 3)
    assert times.collect().metrics()["perf/seconds_other"] == 0.0


def test_what_the_machine_does_is_measured_once_for_a_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(ppo_metrics, "measured_peak_flops", lambda device, dtype: measured.append(dtype) or 1e9)
    monkeypatch.setattr(ppo_metrics, "measured_bandwidth", lambda device: 1e8)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        ppo_metrics.machine_peaks.cache_clear()  # as in a process of its own
        assert ppo_metrics.machine_peaks(CPU, dtype) == {"perf/peak_flops": 1e9, "perf/bandwidth": 1e8}
    assert measured == [torch.float32, torch.bfloat16]
    ppo_metrics.machine_peaks.cache_clear()  # what was found here is not for the tests that follow


def test_a_peak_that_cannot_be_set_back_is_not_shown(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase_timer, "reset_peak", lambda device: False)
    times = PhaseTimer(CPU)
    with times("train"):
        clock(1.0)
    assert times.collect().metrics() == {"perf/seconds_train": 1.0, "perf/seconds_other": 0.0}


def test_a_mark_that_stays_where_it_was_counts_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {"VmHWM": 3 << 30, "VmRSS": 1 << 30}  # as in a sandbox that takes the write and does nothing
    monkeypatch.setattr(machine, "_resident", marks.__getitem__)
    monkeypatch.setattr(machine, "_highest", {})
    assert not machine.reset_peak(CPU)
    monkeypatch.setattr(machine.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert not machine.reset_peak(CPU)


def test_the_peak_of_the_process_outlives_a_reset() -> None:
    held = machine._scratch(50_000_000, torch.float32, CPU).fill_(1.0)
    before = machine.peak_memory_gb(CPU)
    del held  # goes back to the system
    if not machine.reset_peak(CPU):
        pytest.skip("this system does not set the mark back")
    assert machine.recent_peak_gb(CPU) < before - 0.15
    assert machine.peak_memory_gb(CPU) >= before - 0.01  # the kernel counts pages in lots
    highest = machine.peak_memory_gb(CPU)
    held = machine._scratch(100_000_000, torch.float32, CPU).fill_(1.0)
    del held
    assert machine.reset_peak(CPU, forget=True)
    assert machine.peak_memory_gb(CPU) < highest + 0.05  # as if it had never been


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny run with two iterations of PPO-ptx."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["tiny", "tracking.wandb=disabled", "run.device=cpu", "rank.prompts=8", "rank.outputs_per_prompt=3"]
    small += ["data.max_response_tokens=16", "data.validation_fraction=0.3", "ppo.episodes=16", "ppo.batch_size=8"]
    small += ["reward.batch_size=2", f"run.dir={folder}", "run.name=small"]
    for stage in (sft, rank, reward):
        assert stage.main(small) == 0
    assert ppo.main([*small, "--variant", "ppo-ptx"]) == 0
    yield folder / "small"


def test_the_profile_of_a_run(run: Path) -> None:
    found = profile.profile(run)
    assert (found.stage, found.iterations) == ("ppo-ptx", 1)
    names = ["rollout", "score", "train", "ptx", "optimizer", "save", "other"]
    assert [cost.name for cost in found.costs] == names
    assert all(cost.floor and cost.floor > 0 for cost in found.costs[:5])
    rows = [json.loads(line) for line in (run / "ppo-ptx" / "metrics.jsonl").read_text().splitlines()]
    design = {"rollout_tokens_per_s", "train_tokens_per_s", "mfu", *(f"seconds_{name}" for name in names)}
    assert {f"perf/{name}" for name in design} | {"memory/peak_gb"} <= rows[1].keys()
    # What a row accounts for is the time since the row before.
    passed = rows[1]["time"] - rows[0]["time"]
    assert sum(cost.seconds for cost in found.costs) == pytest.approx(passed, rel=0.05, abs=0.2)
    first = {cost.name: cost.seconds for cost in found.first}
    assert first["rollout"] == rows[0]["perf/seconds_rollout"] and "save" not in first
    mean_length = rows[1]["ppo/response_length"]
    assert rows[1]["perf/rollout_tokens_per_s"] == pytest.approx(8 * mean_length / rows[1]["perf/seconds_rollout"])
    assert rows[1]["perf/decode_rows"] == pytest.approx(8 * (mean_length - 1))
    assert 0 <= rows[1]["perf/padding_train"] < 1 and rows[1]["perf/padding_ptx"] == 0
    assert rows[1]["perf/mfu"] > 0 and rows[1]["memory/peak_gb"] >= rows[1].get("memory/train_gb", 0)
    # Policy, value, reference and reward model; AdamW's two moments of the first two.
    assert found.memory["optimiser state"] == 2 * (found.memory["weights: policy"] + found.memory["weights: value"])
    assert found.memory["measured peak"] == pytest.approx(rows[1]["memory/peak_gb"] * 1e9)
    parts = sum(size for name, size in found.memory.items() if name != "measured peak")
    assert parts == pytest.approx(found.memory["measured peak"])
    assert all(rate > 0 for rate in found.rates.values())


def test_the_rate_of_a_stage_passes_over_a_stop() -> None:
    """100 tokens a second, an hour of rest between the second row and the third, and a second row at one place."""
    points = [(1000, 10.0), (1200, 12.0), (1400, 3612.0), (1600, 3614.0), (1600, 3615.0)]
    assert profile._rate([{"step": step, "time": when} for step, when in points]) == 100.0
    assert profile._rate([{"step": 5, "time": 1.0}]) is None


def test_the_command_shows_a_table_and_json(run: Path) -> None:
    done = CliRunner().invoke(app, ["profile", str(run)])
    assert done.exit_code == 0, done.output
    for words in ("rollout", "  decode", "bound by", "optimiser state", "measured peak", "Furthest from its floor: "):
        assert words in done.output
    found = json.loads(CliRunner().invoke(app, ["profile", str(run), "--variant", "ppo-ptx", "--json"]).output)
    assert found["stage"] == "ppo-ptx" and found["phases"][0]["name"] == "rollout" and found["furthest"]


def test_what_has_no_profile_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        profile.profile(tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="no iteration of ppo-ptx or ppo is finished"):
        profile.profile(tmp_path)
    with pytest.raises(UserError, match="no iteration of ppo is finished"):
        profile.profile(run, "ppo")


def test_a_log_from_before_floors_shows_its_seconds(tmp_path: Path, run: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    row = {"step": 16, "axis": "episodes", "time": 1.0, "perf/seconds_rollout": 3.0, "perf/seconds_train": 1.0}
    (tmp_path / "ppo" / "metrics.jsonl").write_text(
        json.dumps(row) + '\n{"step": 32, "perf/sec'
    )  # killed while writing
    found = profile.profile(tmp_path)
    assert [(cost.name, cost.share, cost.floor) for cost in found.costs] == [
        ("rollout", 0.75, None),
        ("train", 0.25, None),
    ]
    assert found.first == [] and found.memory == {}
    profile.show(tmp_path)
