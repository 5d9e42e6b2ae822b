"""`rlhf export RUN`: a stage's model as a plain Hugging Face folder with a card, its adapter merged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from launch.commands.model_card import write_card
from rlhf.errors import UserError
from rlhf.models.loading import load_policy, load_reward_model, save_model
from rlhf.models.peft.folder import AdapterFolder, find_adapter
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.models.peft.peft_layout import DERIVED, ONE_TO_ONE
from rlhf.models.pretrained import fold_scale, load_config
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe import load_recipe
from rlhf.rollout.probes import FILE as PROBES
from rlhf.run.folder import RunFolder
from rlhf.stage_table import PPO_VARIANTS
from rlhf.system.console import console
from rlhf.system.files import require_disk, size_of
from rlhf.system.quiet import quiet_libraries

FOLDER = "merged"


def export_model(run: Path, stage: str = "", ema: bool = False, out: Path | None = None, copy: bool = False) -> Path:
    """Write the model of a stage, with its card, as a folder that any program loads, and return the folder.

    By default the first of PPO-ptx, PPO and SFT that the run has, or its averaged policy (`ema`), goes to `merged/` in
    the stage's folder. A policy without an adapter stays where it is, unless `out` names a folder or a `copy` is
    wanted. The scale of a reward model's scores goes into its head. Raises UserError if there is no such run or model,
    or with the reason why it cannot be merged.
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
    if adapter is None and stage != "reward" and out is None and not copy:
        console.print(f"a plain model already: {source}", markup=False, soft_wrap=True)
        return source
    if adapter is not None and (reason := why_not_mergeable(adapter.peft)):
        fix = "load it with rlhf.models.loading.load_policy, which puts the adapter on its base"
        if adapter.peft.method in (*ONE_TO_ONE, *DERIVED):
            fix += "; or with peft's PeftModel, whose layout the folder has (docs/parameter-efficient.md)"
        raise UserError(f"it cannot be merged: {reason}", str(source), fix)
    if out is not None:
        _require_new(out)  # only what an earlier export wrote at its own place is replaced
    return _write(RunFolder(run), stage, source, adapter, out or run / stage / (f"{FOLDER}-ema" if ema else FOLDER))


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Upload an exported folder to a repository of the Hub, made if it is not there, and return its address.

    The probes of a reward model stay here: they are prompts and responses of the run. The token is the one of
    `hf auth login` or of HF_TOKEN. Raises UserError with the Hub's own words if it refuses.
    """
    hub = HfApi()
    try:
        address = str(hub.create_repo(repository, private=private or None, exist_ok=True))
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[PROBES],
            commit_message="Upload by rlhf export",
        )
    except (HTTPError, HFValidationError, OSError) as error:
        fix = f"log in (`hf auth login`) and check the name OWNER/NAME; the folder is written: {folder}"
        raise UserError(f"the Hub did not take the model: {str(error).strip()}", repository, fix) from error
    return address


def _require_new(out: Path) -> None:
    if out.exists():
        raise UserError("the folder is there already, and nothing in it is touched", str(out), "name another (--out)")


def _write(run: RunFolder, stage: str, source: Path, adapter: AdapterFolder | None, out: Path) -> Path:
    recipe = load_recipe(str(run.recipe_file()))
    section = recipe.reward_format if stage == "reward" else recipe.model
    if adapter is None:  # in the type that its weights are stored in
        stored = load_config(str(source), section).dtype
        section = section.model_copy(update={"dtype": str(stored).removeprefix("torch.")} if stored else {})
    load = load_reward_model if stage == "reward" else load_policy
    model, tokenizer = load(source, section, merged=True), load_tokenizer(source, section)
    if stage == "reward":
        fold_scale(model)
    require_disk(out.parent, sum(p.numel() * p.element_size() for p in model.parameters()), "the exported model")
    save_model(model, tokenizer, out)
    if (source / PROBES).is_file():  # normalised scores, which are as before
        shutil.copyfile(source / PROBES, out / PROBES)
    write_card(out, run, stage, recipe, tokenizer, getattr(model.config, "reward_mean", 0.0))
    what = f"{adapter.peft.method} merged into {adapter.base.name}" if adapter else "the model"
    console.print(f"{what}: {out} ({size_of(out) / 1e6:.0f} MB)", markup=False, soft_wrap=True)
    return out
