"""Cards that a plan can be made for, with the figures of their data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

from rlhf.errors import UserError
from rlhf.system.machine_peaks import machine_peaks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Card:
    """A device that one process works on."""

    name: str
    memory: float  # bytes; for `cpu` of the whole machine, which all processes share
    flops: dict[str, float]  # FLOP/s by type of the weights, dense; float32 without TF32, which is PyTorch's default
    bandwidth: float  # bytes per second from its memory
    link: float = 0.0  # bytes per second that it sends to others of its machine, while it receives as many
    base: float = 1.2e9  # bytes in use before the first tensor: CUDA context, communication buffers. Our assumption
    network: float = 50e9  # bytes per second that it sends to other machines: 400 Gbit/s a card. Our assumption
    per_machine: int = 8  # cards of a machine. Our assumption

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def _card(name: str, gigabytes: float, bf16: float, fp32: float, bandwidth: float, link: float) -> Card:
    """Return a card; memory in units of 1e9 bytes, TFLOP/s dense, bandwidth in TB/s, link in GB/s one way."""
    flops = {"bfloat16": bf16 * 1e12, "float32": fp32 * 1e12}
    return Card(name, gigabytes * 1e9, flops, bandwidth * 1e12, link * 1e9)


CARDS = {
    card.name: card
    for card in (
        _card("a100-40g", 40, 312, 19.5, 1.555, 300),
        _card("a100-80g", 80, 312, 19.5, 2.039, 300),
        _card("h100-80g", 80, 989, 67, 3.35, 450),
        _card("h200-141g", 141, 989, 67, 4.8, 450),
        _card("b200-180g", 180, 2250, 75, 7.7, 900),
        _card("l40s-48g", 48, 362, 91.6, 0.864, 32),
        _card("a10-24g", 24, 125, 31.2, 0.6, 32),
        _card("rtx4090-24g", 24, 165, 82.6, 1.008, 32),
        _card("v100-32g", 32, 125, 15.7, 0.9, 150),  # its 16-bit rate is float16's: it computes bfloat16 much slower
    )
}


def find_card(name: str) -> Card:
    """Return the card of that name, `cpu` for this machine; raise UserError if there is no such card."""
    if name == "cpu":
        return this_machine()
    if name not in CARDS:
        raise UserError(f"there is no card {name!r}", "--gpu", f"one of: cpu, {', '.join(CARDS)}")
    return CARDS[name]


@lru_cache(maxsize=2)
def this_machine(device: torch.device = CPU) -> Card:
    """Return this machine's CPU or GPU as a card: its memory, and its speed as measured here once, in some seconds."""
    peaks = {name: machine_peaks(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    flops = {name: found["perf/peak_flops"] for name, found in peaks.items()}
    bandwidth = peaks["float32"]["perf/bandwidth"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Card(properties.name, float(properties.total_memory), flops, bandwidth)
    return Card("cpu", float(psutil.virtual_memory().total), flops, bandwidth, base=0.0)
