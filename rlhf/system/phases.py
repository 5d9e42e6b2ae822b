"""The phase that this process is in, for the log and for rlhf/system/watchdog.py; phase_timer.py measures PPO's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Phases of an iteration of PPO, in this order; the other stages have some of them. A stage begins in "start", and one
# that waits for people is in "labelling".
PHASES = ("rollout", "score", "train", "ptx", "optimizer", "save")


@dataclass
class PhaseState:
    """The phase of a process and its progress; all processes of a stage have the same phases in the same order."""

    phase: str = "start"
    step: int | None = None  # number of an iteration, an optimiser step or a chunk
    beat: int = 0  # number of phases and steps begun, compared between processes
    activity: int = 0  # grows with every sign of progress, smaller ones included

    def words(self) -> str:
        """Return the phase in words, such as `phase train, step 3`."""
        return f"phase {self.phase}" + (f", step {self.step}" if self.step is not None else "")


now = PhaseState()
_listeners: list[Callable[[], None]] = []  # called when another phase begins


def phase(name: str, step: int | None = None) -> None:
    """Announce that a phase, or the next step of the same phase, begins; it lasts until the next call."""
    another = name != now.phase
    now.phase, now.step = name, step
    now.beat += 1
    now.activity += 1
    if another:
        for listener in _listeners:
            listener()


def heartbeat() -> None:
    """Report progress within the phase; loops with a progress bar do so at every advance."""
    now.activity += 1


def on_phase_change(call: Callable[[], None] | None) -> None:
    """Reset the state to the start of a stage and have `call` called when a phase begins; None removes the call."""
    _listeners.clear()
    if call:
        now.phase, now.step, now.beat, now.activity = "start", None, 0, 0
        _listeners.append(call)
