"""Silence the libraries: our own lines and progress bars are enough."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

from rlhf.system.console import note


def quiet_libraries() -> None:
    """Silence warnings about later versions and TRL's telemetry, and remove variables that would change the training.

    `accelerate launch` sets variables from which Accelerate would choose ZeRO stage and precision; the recipe chooses.
    """
    for module in ("transformers", "torch", "accelerate", "trl", "deepspeed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # the variable of that name is read when the client is imported
    ruled = [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]
    if any(os.environ[name] == "true" for name in ruled if name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")):
        note("ZeRO stage and precision are the recipe's (launch.zero_stage, model.dtype), not those of `accelerate`")
    for name in ruled:
        del os.environ[name]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and loading reports of transformers inside the block; errors still come through.

    The caller checks what the reports would say: it refuses missing weights, for instance.
    """
    from transformers.utils import logging  # seconds to import, which a command that loads no model is spared

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = getLogger("huggingface_hub")  # logs every retry
    hub_level = hub.level
    hub.setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()
