"""Loading models for a run on several processes: DeepSpeed's settings for a recipe, and where its weights are placed.

Under ZeRO-3 a model that an engine trains is partitioned while it is loaded, so that no process ever holds it whole. A
model that only samples or scores is placed as `launch.frozen` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.models.loading import load_policy
from rlhf.models.placement import Placement
from rlhf.recipe import DEEPSPEED_FILES
from rlhf.system.distributed import processes

Model = TypeVar("Model", bound=nn.Module)


def config_path(recipe: Recipe) -> Path:
    """Return the path of a recipe's DeepSpeed JSON: the user's own file, or the template of the ZeRO stage."""
    launch = recipe.launch
    offload = "-offload" if launch.offload else ""
    return Path(launch.deepspeed_config or DEEPSPEED_FILES / f"zero{launch.zero_stage}{offload}.json").expanduser()


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's settings for our loops: the recipe's JSON with what the loops decide filled in.

    Raises UserError if the user's own file sets what the recipe decides, or a layout that checkpoints do not know.
    """
    path = config_path(recipe)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("optimizer", "scheduler", "torch_autocast"):
        if key in found:
            raise UserError(f"{key} is the recipe's to say", str(path), f"take {key} out of the DeepSpeed file")
    zero = found.get("zero_optimization", {})
    if zero.get("round_robin_gradients") or "nvme" in _devices(zero):
        what = "round_robin_gradients and state on NVMe have a layout that checkpoints do not support"
        raise UserError(what, str(path), "take them out of zero_optimization; offloading to cpu is known")
    if zero.get("stage", 0) != 2:
        zero["overlap_comm"] = False  # DeepSpeed overlaps on ZeRO 2 alone where the caller owns the boundary
    if zero.get("stage", 0) == 3:
        zero["sub_group_size"] = 10**15  # else a large group is stepped, and clipped, in pieces with norms of their own
    return found | {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's own bookkeeping: the loops cut the micro-batches
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # by group, in ClippedAdamW
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _devices(zero: dict[str, Any]) -> set[str]:
    """Return the devices that a file's zero_optimization moves state to."""
    return {str(part.get("device")) for part in zero.values() if isinstance(part, dict)}


def zero_stage(recipe: Recipe) -> int:
    """Return the ZeRO stage of the recipe's DeepSpeed file; 0 for a single process, which runs without DeepSpeed."""
    return int(settings(recipe).get("zero_optimization", {}).get("stage", 0)) if processes() > 1 else 0


def trained(recipe: Recipe, load: Callable[[], Model]) -> Model:
    """Load a model that an engine will train; under ZeRO-3 it is partitioned while it is loaded."""
    with _loading(recipe, zero_stage(recipe) == 3):
        model = load()
    model.placement = Placement(by_layer=recipe.launch.gather == "by_layer")
    return model


def frozen(recipe: Recipe, device: torch.device, load: Callable[[], Model], drop_after_use: bool = False) -> Model:
    """Load a model that only samples or scores, on `device` and without gradients; place it as `launch.frozen` says.

    With `drop_after_use` its weights that are mapped from a file are dropped from a CPU's memory between passes.
    """
    how = recipe.launch.frozen
    with _loading(recipe, how == "partitioned"):
        model = load()
    model.requires_grad_(False)
    if how == "cpu":
        model.placement = Placement(onload_to=device)
    else:
        model.placement = Placement(by_layer=recipe.launch.gather == "by_layer", drop_after_use=drop_after_use)
        model.to(device)
    return model.eval()


def load_frozen_policy(
    recipe: Recipe, device: torch.device, where: str | Path, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load a policy that only samples or scores (see `frozen`), with its adapter merged where the method allows it."""
    return frozen(recipe, device, lambda: load_policy(where, recipe.model, tokenizer=tokenizer, merged=True))


@contextmanager
def _loading(recipe: Recipe, partitioned: bool) -> Iterator[None]:
    """Partition every model that is built inside the block, if `partitioned`, so that no process holds one whole."""
    if not partitioned or processes() == 1:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    connect()
    config = settings(recipe)
    if zero_stage(recipe) != 3:
        config["zero_optimization"] = {"stage": 3}
    live = HfDeepSpeedConfig(config)  # transformers builds models under deepspeed.zero.Init while it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del live


def connect() -> None:
    """Let DeepSpeed use the process group that exists already."""
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Otherwise every start compiles an operator for a minute or more, which training does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
