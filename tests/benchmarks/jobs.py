"""Which programs make up each part of the benchmark, and which numbers are read from what they print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Order
from benchmarks.table import OURS
from benchmarks.workload import Workload

Result = dict[str, Any]
Read = Callable[[Result], float]
HERE = sys.executable
TRL_PPO, GENERATE, VLLM, TRL_REWARD, TRL_SFT = "TRL 1.12 PPOTrainer", "transformers", "vLLM", "TRL", "TRL"


@dataclass
class Job:
    """One side of one case: a program, its order, and its numbers by (case, unit)."""

    part: str
    case: str
    side: str
    module: str
    order: Order
    reads: dict[tuple[str, str], Read]
    python: str = HERE
    skip: str = ""  # why it cannot run here
    once: bool = False  # not repeated: long, and compared with itself only
    results: list[Result] = field(default_factory=list)


def later(values: list[float]) -> float:
    """The median of all but the first."""
    return median(values[1:])


def dtypes(no_bf16: str) -> list[tuple[str, str]]:
    """(type, why it is left out)."""
    return [("float32", ""), ("bfloat16", no_bf16)]


def ppo(work: Workload, pythons: dict[str, str], no_bf16: str) -> list[Job]:
    """Whole iterations, the first apart from the later ones."""
    jobs = []
    for dtype, skip in dtypes(no_bf16):
        reads = {
            (f"{dtype}, first iteration", "s"): lambda r: r["iterations"][0],
            (f"{dtype}, later iterations", "s"): lambda r: later(r["iterations"]),
            (f"{dtype}, their rollouts", "s"): lambda r: later(r["rollouts"]),
        }
        order = work.ppo(dtype, work.sizes.iterations)
        jobs.append(Job("ppo", dtype, OURS, "ppo_iteration", order, reads, skip=skip))
        jobs.append(Job("ppo", dtype, TRL_PPO, "peers.trl_ppo", order, reads, pythons["trl"], skip))
    if work.sizes.many_iterations:
        reads = {
            ("second iteration of many", "s"): lambda r: r["iterations"][1],
            ("last iteration of many", "s"): lambda r: r["iterations"][-1],
        }
        order = work.ppo("float32", work.sizes.many_iterations)
        jobs.append(Job("ppo", "many iterations", OURS, "ppo_iteration", order, reads, once=True))
    return jobs


def rollouts(work: Workload, pythons: dict[str, str], no_bf16: str) -> list[Job]:
    """Sampling of one batch."""
    jobs = []
    for dtype, skip in dtypes(no_bf16):
        order = work.rollouts(dtype)
        tokens = len(order["prompts"]) * order["new_tokens"]
        reads = {(f"{dtype}, batch {len(order['prompts'])}", "tokens/s"): lambda r, n=tokens: n / median(r["seconds"])}
        jobs.append(Job("rollouts", dtype, OURS, "rollouts", order, reads, skip=skip))
        jobs.append(Job("rollouts", dtype, GENERATE, "peers.generate", order, reads, skip=skip))
        jobs.append(Job("rollouts", dtype, VLLM, "peers.vllm_rollout", order, reads, pythons["vllm"], skip))
    return jobs


def training(work: Workload, pythons: dict[str, str], no_bf16: str) -> list[Job]:
    """Share of the peak in the PPO update."""
    jobs = []
    for dtype, skip in dtypes(no_bf16):
        reads = {
            (f"{dtype}, share of the peak", "share"): lambda r: median(u["share"] for u in r["updates"]),
            (f"{dtype}, peak", "GFLOP/s"): lambda r: max(max(u["peaks"]) for u in r["updates"]) / 1e9,
        }
        order = work.ppo(dtype, max(2, work.sizes.iterations - 1))
        jobs.append(Job("training", dtype, OURS, "training", order, reads, skip=skip))
    return jobs


def reward(work: Workload, pythons: dict[str, str], no_bf16: str) -> list[Job]:
    """Reward-model steps by K, and our peak memory by K."""
    jobs = []
    for k in work.sizes.reward_ks:
        order = work.reward(k, losses=True)
        compared = order["batch"] * comb(k, 2)
        reads = {(f"K = {k}", "comparisons/s"): lambda r, n=compared: n / median(r["seconds"])}
        jobs.append(Job("reward", f"K = {k}", OURS, "reward_step", order, reads))
        jobs.append(Job("reward", f"K = {k}", TRL_REWARD, "peers.trl_reward", order, reads))
    for k in work.sizes.memory_ks:
        case, order = f"memory at K = {k}", work.reward(k, losses=False)
        jobs.append(Job("reward", case, OURS, "reward_step", order, {(case, "GB"): lambda r: r["peak_gb"]}, once=True))
    return jobs


def sft(work: Workload, pythons: dict[str, str], no_bf16: str) -> list[Job]:
    """SFT steps."""

    def speed(r: Result) -> float:
        return (r["tokens"][-1] - r["tokens"][0]) / (r["times"][-1] - r["times"][0])

    order, reads = work.sft(), {("packed rows", "tokens/s"): speed}
    sides = {OURS: "sft_step", TRL_SFT: "peers.trl_sft"}
    return [Job("sft", "packed rows", side, module, order, reads) for side, module in sides.items()]


def growth(work: Workload, pythons: dict[str, str], no_bf16: str) -> list[Job]:
    """Cost against work while one size grows and the others stay."""
    s, jobs = work.sizes, []
    points = [(f"{n} response tokens", 8, n, s.growth_depth) for n in s.growth_lengths]
    points += [(f"batch {n}", n, 32, s.growth_depth) for n in s.growth_batches]
    points += [(f"{n} layers", 8, 32, n) for n in s.growth_depths]
    for case, batch, length, layers in points:
        reads = {
            (f"rollout, {case}", "s/TFLOP"): lambda r: r["rollout_s"] / r["rollout_flops"] * 1e12,
            (f"update, {case}", "s/TFLOP"): lambda r: r["train_s"] / r["train_flops"] * 1e12,
        }
        jobs.append(Job("growth", case, OURS, "growth", work.growth(batch, length, layers), reads, once=True))
    return jobs


Part = Callable[[Workload, dict[str, str], str], list[Job]]
PARTS: dict[str, Part] = {part.__name__: part for part in (ppo, rollouts, training, reward, sft, growth)}


def peers(root: Path) -> dict[str, str]:
    """The Python of each peer's environment, which `make bench` builds."""
    return {name: str(root / ".bench" / name / "bin" / "python") for name in ("trl", "vllm")}
