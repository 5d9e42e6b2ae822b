"""`rlhf export RUN`: a stage's model as a plain Hugging Face folder, its adapter merged into the weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from rlhf.errors import UserError
from rlhf.models.loading import load_policy, load_reward_model, save_model
from rlhf.models.peft.folder import AdapterFolder, find_adapter
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.models.peft.peft_layout import DERIVED, ONE_TO_ONE
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe import load_recipe
from rlhf.run.folder import RunFolder
from rlhf.stage_table import PPO_VARIANTS
from rlhf.system.console import console
from rlhf.system.files import require_disk, size_of
from rlhf.system.quiet import quiet_libraries

FOLDER = "merged"


def export_model(run: Path, stage: str = "", ema: bool = False, out: Path | None = None) -> Path:
    """Write the model of a stage as a folder that any program loads, and return the folder.

    By default the first of PPO-ptx, PPO and SFT that the run has, or its averaged policy (`ema`), goes to `merged/` in
    the stage's folder. Raises UserError if there is no such run or model, or with the reason why it cannot be merged.
    """
    quiet_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    RunFolder(run).recipe_file()
    name = "ema" if ema else "model"
    stage = stage or next((s for s in (*PPO_VARIANTS, "sft") if (run / s / name).is_dir()), "sft")
    source = run / stage / name
    if not source.is_dir():
        raise UserError(f"the run has no {stage}/{name}", str(source), "run the stage first, or name another (--stage)")
    adapter = find_adapter(source)
    if adapter is None:
        if out is not None:
            _require_new(out)
            require_disk(out.parent, size_of(source), "the copy")
            shutil.copytree(source, out)
        console.print(f"a plain model already: {out or source}", markup=False, soft_wrap=True)
        return out or source
    if reason := why_not_mergeable(adapter.peft):
        fix = "load it with rlhf.models.loading.load_policy, which puts the adapter on its base"
        if adapter.peft.method in (*ONE_TO_ONE, *DERIVED):
            fix += "; or with peft's PeftModel, whose layout the folder has (docs/parameter-efficient.md)"
        raise UserError(f"it cannot be merged: {reason}", str(source), fix)
    if out is not None:
        _require_new(out)  # only what an earlier export wrote at its own place is replaced
    return _merge(run, source, adapter, out or run / stage / (f"{FOLDER}-ema" if ema else FOLDER))


def _require_new(out: Path) -> None:
    if out.exists():
        raise UserError("the folder is there already, and nothing in it is touched", str(out), "name another (--out)")


def _merge(run: Path, source: Path, adapter: AdapterFolder, out: Path) -> Path:
    recipe = load_recipe(str(run / "recipe.yaml"))
    load = load_reward_model if adapter.scalar else load_policy
    model = load(source, recipe.model, merged=True)
    require_disk(out.parent, sum(p.numel() * p.element_size() for p in model.parameters()), "the merged model")
    save_model(model, load_tokenizer(source, recipe.model), out)
    size = f"{size_of(out) / 1e6:.0f} MB"
    text = f"{adapter.peft.method} merged into {adapter.base.name}: {out} ({size})"
    console.print(text, markup=False, soft_wrap=True)
    return out
