"""Memory and time of a PPO iteration with one base and with four copies: `tests/benchmarks/shared_base.py FOLDER`.

SmolLM2-135M in float32 on a CPU: 32 episodes, prompts of 40 tokens, responses of exactly 48, 4 minibatches, no averaged
policy, no pretraining loss. Each row is a fresh process that runs two iterations: its largest resident set, and wall
and CPU seconds of the second iteration, the median of REPEATS processes that take turns. FOLDER keeps the models and
shared_base.json; further arguments are the number of repeats (1) and the ways, by number (all).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("a", "name", "of", "the", "river", "that", "runs", "by", "our", "old", "town", "and", "under", "bridges")
LORA = ("model.lora.enabled=true", "reward.lora.enabled=true", "ppo.lr=1e-4", "ppo.value_lr=1e-4")
LAST = ("model.lora.last_layers=10", "reward.lora.last_layers=10")
WAYS: dict[str, tuple[str, ...]] = {
    "all weights trained, four copies": (),
    "LoRA, three bases": LORA,
    "LoRA, one base": LORA,
    "LoRA on the last 10 layers, one base": (*LORA, *LAST),
}
PHASES = ("rollout", "score", "train")


def settings(folder: Path, way: str) -> list[str]:
    """Overrides of the demo recipe."""
    common = ["tracking.wandb=disabled", "run.device=cpu", f"data.prompts=[{folder / 'prompts.jsonl'}]"]
    common += ["model.lora.enabled=false", "model.lora.last_layers=0", "reward.keep_layers=0"]
    common += ["data.max_response_tokens=48", "ppo.episodes=64", "ppo.batch_size=32", "ppo.minibatch_size=8"]
    common += ["ppo.micro_batch_size=8", "ppo.ema_decay=0", "ppo.lr=1e-6", "ppo.value_lr=1e-6"]
    return [*common, *WAYS[way]]


def prepare(folder: Path) -> None:
    """Prompts of 40 tokens, and for each kind of adapter what the earlier stages would leave."""
    import torch

    from rlhf.adapters import add_lora
    from rlhf.models import load_tokenizer, new_reward_model, resolve_model, save_model
    from rlhf.probes import write_probes
    from rlhf.prompting import encode_prompt
    from rlhf.recipe import load_recipe
    from rlhf.records import Prompt
    from rlhf.rundir import hash_path
    from rlhf.shared_base import FOLDER, save_adapter, trainable

    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_model("smollm2-135m")
    tokenizer, rows = load_tokenizer(source), []
    for i in range(64):
        text = f"{i}"
        for n in range(100):
            longer = f"{text} {WORDS[(i + n) % len(WORDS)]}"
            if len(encode_prompt(tokenizer, Prompt.from_text(longer))) > 40:
                break
            text = longer
        rows.append(json.dumps({"prompt": text}))
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    shutil.copytree(source, folder / "sft" / "model", dirs_exist_ok=True)
    for way in list(WAYS)[2:]:
        recipe = load_recipe("demo", settings(folder, way))
        torch.manual_seed(1)
        model = add_lora(new_reward_model(folder / "sft" / "model", recipe.model), recipe.reward.lora, "SEQ_CLS")
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.normal_(std=0.01)
        model.config.reward_mean, model.config.reward_std = 0.0, 1.0
        reward = reward_folder(folder, way)
        save_model(model, tokenizer, reward / "model")
        write_probes(model, tokenizer, [([5, 6, 7], [8, 9])], reward / "model")
        hashes = (hash_path(folder / "sft" / "model"), hash_path(reward / "model"))
        save_adapter(model, model.state_dict(), recipe, reward / FOLDER, *hashes)


def reward_folder(folder: Path, way: str) -> Path:
    """Where the reward stage's result for a way lies."""
    return folder / ("reward-last" if LAST[0] in WAYS[way] else "reward")


def measure(folder: Path, way: str) -> dict[str, float]:
    """Two iterations in this process."""
    import torch

    from rlhf.allocator import keep_freed_memory
    from rlhf.phasetime import PhaseTimes
    from rlhf.ppo_state import build
    from rlhf.quiet import quiet_libraries
    from rlhf.recipe import load_recipe
    from rlhf.rundir import hash_path
    from stages.ppo import rollout, score, update

    keep_freed_memory()
    quiet_libraries()
    sft, reward = folder / "sft" / "model", reward_folder(folder, way) / "model"
    # Without the hashes no adapter is known to belong to the models.
    hashes = (hash_path(sft), hash_path(reward)) if "one base" in way else ("", "")
    begin = time.perf_counter()
    ppo = build(load_recipe("demo", settings(folder, way)), False, sft, reward, hashes)
    found = {"build": time.perf_counter() - begin}
    times = PhaseTimes(ppo.engine.device, torch.float32)
    ppo.stop_ids = [-1]  # no token ends a response: the same work for all
    for ppo.iteration in (0, 1):
        begin, cpu = time.perf_counter(), time.process_time()
        episodes = rollout(ppo)
        found["rollout"] = time.perf_counter() - begin
        middle = time.perf_counter()
        experience = score(ppo, episodes)
        found["score"] = time.perf_counter() - middle
        middle = time.perf_counter()
        update(ppo, experience, times)
        now = time.perf_counter()
        found |= {"train": now - middle, "wall": now - begin, "cpu": time.process_time() - cpu}
    found["peak"] = times.peak_gb()
    found["trained"] = float(sum(p.numel() for p in ppo.engine.trainable().values()))
    return found


def in_a_fresh_process(folder: Path, way: str) -> dict[str, float]:
    """`measure` where nothing has been allocated before."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "HF_HUB_OFFLINE": "1"}
    code = "import sys, json, pathlib, shared_base as b; found = b.measure(pathlib.Path(sys.argv[1]), sys.argv[2]); "
    code += "print('\\n' + json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code, str(folder), way], env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def main(folder: Path, repeats: int = 1, *ways: int) -> None:
    """Measure and print; what an earlier call measured of other ways is kept."""
    if not (folder / "reward-last" / "adapter").exists():
        prepare(folder)
    kept = folder / "shared_base.json"
    runs: dict[str, list[dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    chosen = [way for i, way in enumerate(WAYS) if not ways or i in ways]
    runs |= {way: [] for way in chosen}
    for _ in range(repeats):
        for way in chosen:
            runs[way].append(in_a_fresh_process(folder, way))
            kept.write_text(json.dumps(runs, indent=1))
    print("| | trained weights | peak | of four copies | iteration | rollout | score | train | CPU | build |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    medians = {way: {key: median(run[key] for run in runs[way]) for key in runs[way][0]} for way in WAYS if way in runs}
    whole = medians.get(next(iter(WAYS)), {}).get("peak", float("nan"))
    for way, m in medians.items():
        times = " | ".join(f"{m[key]:.1f} s" for key in ("wall", *PHASES, "cpu", "build"))
        print(f"| {way} | {m['trained'] / 1e6:.1f} M | {m['peak']:.2f} GB | {m['peak'] / whole:.2f} | {times} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
