"""The phase that this process is in, for the log and the watch over a distributed run (rlhf/system/watchdog.py).

rlhf/system/phase_timer.py measures the phases of PPO besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Of an iteration of PPO, in this order; the other stages have some of them. Besides, a stage begins in "start", and one
# that waits for people is in "labelling".
PHASES = ("rollout", "score", "train", "ptx", "optimizer", "save")


@dataclass
class PhaseState:
    """Where a process is; all processes of a stage go through the same phases in the same order."""

    phase: str = "start"
    step: int | None = None  # of the phase: an iteration, an optimiser step or a chunk
    beat: int = 0  # phases and steps begun, to be compared between processes
    activity: int = 0  # grows with every sign of progress, smaller ones included

    def words(self) -> str:
        """Return the phase in words, such as `phase train, step 3`."""
        return f"phase {self.phase}" + (f", step {self.step}" if self.step is not None else "")


now = PhaseState()
_listeners: list[Callable[[], None]] = []  # called when another phase begins


def phase(name: str, step: int | None = None) -> None:
    """Say that a phase, or the next step of the same one, begins; it lasts until the next call."""
    another = name != now.phase
    now.phase, now.step = name, step
    now.beat += 1
    now.activity += 1
    if another:
        for listener in _listeners:
            listener()


def heartbeat() -> None:
    """Say that the phase goes on well; loops with a progress bar say it at every advance."""
    now.activity += 1


def on_phase_change(call: Callable[[], None] | None) -> None:
    """Be at the start of a stage and have `call()` made whenever another phase begins; None ends that."""
    _listeners.clear()
    if call:
        now.phase, now.step, now.beat, now.activity = "start", None, 0, 0
        _listeners.append(call)
