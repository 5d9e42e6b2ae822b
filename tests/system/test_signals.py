"""What the processes of a run agree on when one of them, or each, is asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from rlhf.system.signals import Signals

Reduce = Callable[[torch.Tensor, object], None]


def reduce_by(monkeypatch: pytest.MonkeyPatch, reduce: Reduce) -> None:
    """Make this process one of two, whose flag the other changes by `reduce`."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo")
    monkeypatch.setattr(dist, "all_reduce", reduce)


def test_a_signal_during_the_reduction_is_kept_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce_by(monkeypatch, lambda flag, op: os.kill(os.getpid(), signal.SIGTERM))
    signals = Signals()
    with signals.watch():
        assert signals.agreed() == 0
        reduce_by(monkeypatch, lambda flag, op: None)
        assert signals.agreed() == signal.SIGTERM


def test_a_copy_of_the_signal_that_another_process_was_first_to_get_does_not_stop_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reduce_by(monkeypatch, lambda flag, op: flag.fill_(signal.SIGINT))
    signals = Signals()
    with signals.watch():
        assert signals.agreed() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)  # raised StopNow once
        assert signals.agreed() == signal.SIGINT
