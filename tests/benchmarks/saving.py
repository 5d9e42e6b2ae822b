"""What saving every iteration costs PPO on SmolLM2-135M: `python tests/benchmarks/saving.py RUN`.

RUN is a folder with the demo's finished sft, rank and reward stages. PPO-ptx runs for five iterations with
ppo.save_every=1, once as the demo does it and once training all weights of both models, in a folder beside RUN. For
each it prints a row of a Markdown table: bytes of a checkpoint, seconds that the loop waited for it, seconds that it
was flushed, hashed and sealed behind the loop, the hashing alone, and shares of an iteration's wall time: of the
waiting, and of both, which is what saving would cost if nothing went on meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
FULL = ("model.peft.method=none", "ppo.lr=1e-5", "ppo.value_lr=1e-5")
WAYS = {"the demo": (), "all weights": FULL}


def measured(run: Path, way: str) -> dict[str, float]:
    """Means over the iterations that come after a save."""
    folder = run.parent / f"saving-{list(WAYS).index(way)}"
    for stage in ("sft", "reward"):
        shutil.copytree(run / stage / "model", folder / stage / "model")
    settings = [f"run.dir={folder.parent}", f"run.name={folder.name}", "tracking.wandb=disabled", "run.device=cpu"]
    settings += ["ppo.save_every=1", "ppo.episodes=240", *WAYS[way]]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "stages.ppo", "demo", *settings], env=env, check=True)
    rows = [json.loads(line) for line in (folder / "ppo-ptx" / "metrics.jsonl").read_text().splitlines()]
    names = ("checkpoint_gb", "seconds_save", "seconds_seal", "seconds_hash")
    found = {name: mean(row[f"perf/{name}"] for row in rows[2:]) for name in names}
    found["iteration"] = mean(after["time"] - before["time"] for before, after in zip(rows[1:], rows[2:], strict=False))
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Print the table."""
    run = Path(sys.argv[1]).resolve()
    rows = []
    for way in WAYS:
        m = measured(run, way)
        both = m["seconds_save"] + m["seconds_seal"]
        rows.append(
            f"| {way} | {m['checkpoint_gb']:.2f} GB | {m['iteration']:.1f} s | {m['seconds_save']:.2f} s | "
            f"{m['seconds_seal']:.2f} s | {m['seconds_hash']:.2f} s | {m['seconds_hash'] / both:.0%} | "
            f"{m['seconds_save'] / m['iteration']:.1%} | {both / m['iteration']:.1%} |"
        )
    print("| trained | checkpoint | iteration | waited | sealed behind | of it hashed | hashing | waited | both |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
