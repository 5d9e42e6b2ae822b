"""Memory and time of a PPO iteration with one base and with four copies: `tests/benchmarks/shared_base.py FOLDER`.

SmolLM2-135M in float32 on a CPU: 32 episodes, prompts of 40 tokens, responses of exactly 48, 4 minibatches, no averaged
policy, no pretraining loss. Each row is a fresh process that runs two iterations: its largest resident set, and wall
and CPU seconds of the second iteration, the median of REPEATS processes that take turns. FOLDER keeps the models and
shared_base.json; further arguments are the number of repeats (1) and the ways, by number (all).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("a", "name", "of", "the", "river", "that", "runs", "by", "our", "old", "town", "and", "under", "bridges")
RATES = ("ppo.lr=1e-4", "ppo.value_lr=1e-4")
LORA = ("model.peft.method=lora", *RATES)
WAYS: dict[str, tuple[str, ...]] = {
    "all weights trained, four copies": (),
    "LoRA, one base": LORA,
    "LoRA on the last 10 layers, one base": (*LORA, "model.peft.last_layers=10"),
    "bottleneck adapters, one base": ("model.peft.method=adapter", *RATES),
    "prefix tuning, one base": ("model.peft.method=prefix", *RATES),
    "LoRA, one base, activations recomputed": (*LORA, "launch.gradient_checkpointing=true"),
}
PHASES = ("rollout", "score", "train")


def settings(folder: Path, way: str) -> list[str]:
    """Overrides of the demo recipe."""
    common = ["tracking.wandb=disabled", "run.device=cpu", f"data.prompts=[{folder / 'prompts.jsonl'}]"]
    common += ["model.peft.method=none", "model.peft.last_layers=0"]
    common += ["reward.peft.method=model", "reward.keep_layers=0"]
    common += ["data.max_response_tokens=48", "ppo.episodes=64", "ppo.batch_size=32", "ppo.minibatch_size=8"]
    common += ["ppo.micro_batch_size=8", "ppo.ema_decay=0", "ppo.lr=1e-6", "ppo.value_lr=1e-6"]
    return [*common, *WAYS[way]]


def prepare(folder: Path) -> None:
    """Prompts of 40 tokens, and for each way what the earlier stages would leave."""
    import torch

    from rlhf.data.encoding import encode_prompt
    from rlhf.data.records import Prompt
    from rlhf.models.loading import load_policy, load_tokenizer, new_reward_model, save_model
    from rlhf.models.peft.methods import add_adapter
    from rlhf.recipe import load_recipe
    from rlhf.rollout.probes import write_probes

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, rows = load_tokenizer("smollm2-135m"), []
    for i in range(64):
        text = f"{i}"
        for n in range(100):
            longer = f"{text} {WORDS[(i + n) % len(WORDS)]}"
            if len(encode_prompt(tokenizer, Prompt.from_text(longer))) > 40:
                break
            text = longer
        rows.append(json.dumps({"prompt": text}))
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    for way in WAYS:
        recipe = load_recipe("demo", settings(folder, way))
        torch.manual_seed(1)
        policy = load_policy("smollm2-135m", recipe.model)
        if recipe.model.peft.on:
            add_adapter(policy, recipe.model.peft)
        sft, reward = stage_folders(folder, way)
        save_model(policy, tokenizer, sft)
        del policy
        model = new_reward_model(sft, recipe.model, peft=recipe.reward_peft)
        save_model(model, tokenizer, reward)
        write_probes(model, tokenizer, [([5, 6, 7], [8, 9])], reward)


def stage_folders(folder: Path, way: str) -> tuple[Path, Path]:
    """Where the results of the SFT and the reward stage for a way lie."""
    place = folder / f"way-{list(WAYS).index(way)}"
    return place / "sft", place / "reward"


def measure(folder: Path, way: str) -> dict[str, float]:
    """Two iterations in this process."""
    from rlhf.recipe import load_recipe
    from rlhf.system.malloc import keep_freed_memory
    from rlhf.system.quiet import quiet_libraries
    from rlhf.training.ppo_state import build
    from stages.ppo import advantages, rollout, score, update

    keep_freed_memory()
    quiet_libraries()
    sft, reward = stage_folders(folder, way)
    begin = time.perf_counter()
    ppo = build(load_recipe("demo", settings(folder, way)), False, sft, reward)
    found = {"build": time.perf_counter() - begin}
    ppo.stop_ids = [-1]  # no token ends a response: the same work for all
    for ppo.iteration in (0, 1):
        begin, cpu = time.perf_counter(), time.process_time()
        episodes = rollout(ppo)
        found["rollout"] = time.perf_counter() - begin
        middle = time.perf_counter()
        experience = advantages(ppo, score(ppo, episodes))
        found["score"] = time.perf_counter() - middle
        middle = time.perf_counter()
        update(ppo, experience)
        now = time.perf_counter()
        found |= {"train": now - middle, "wall": now - begin, "cpu": time.process_time() - cpu}
    found["peak"] = ppo.phases.peak_gb()
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
    if not (stage_folders(folder, list(WAYS)[-1])[1] / "probes.json").exists():
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
