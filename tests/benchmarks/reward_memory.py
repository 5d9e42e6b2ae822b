"""Peak memory of the reward model's step against K: `python tests/benchmarks/reward_memory.py [TOKENS [LAYERS]]`.

SmolLM2-135M (LAYERS of its 30 layers, 0 for all), all weights trained, prompts of about 40 tokens and outputs of about
48. For each K a process of its own makes two steps of eight prompts in passes of TOKENS (1024), so that 16 outputs go
through in two rounds, and a row of a Markdown table says its peak.
"""

from __future__ import annotations

import random
import subprocess
import sys

import torch

from rlhf.config import Recipe
from rlhf.models.loading import new_reward_model
from rlhf.system.machine import peak_memory_gb
from rlhf.training.engine import LocalEngine, ParamGroup
from rlhf.training.ranking_passes import Group, ScoringModule
from stages.reward import step

OUTPUTS = (2, 4, 9, 16)
PROMPTS, STEPS = 8, 2


def rankings(prompts: int, k: int, seed: int = 0) -> list[Group]:
    """Prompts of 30 to 50 random tokens with k outputs of 40 to 56, ranked at random without ties."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(1000, 40000) for _ in range(rng.randint(low, high))]

    made = []
    for _ in range(prompts):
        prompt = tokens(30, 50)
        made.append(Group([(prompt, tokens(40, 56)) for _ in range(k)], tuple(rng.sample(range(1, k + 1), k))))
    return made


def peak(k: int, tokens: int, layers: int) -> float:
    """GB that this process had at most after the steps; to be called in a process of its own."""
    recipe = Recipe.model_validate({"model": {"name": "smollm2-135m"}, "reward": {"micro_tokens": tokens}})
    torch.manual_seed(0)
    model = new_reward_model(recipe.model.name, recipe.model, layers).eval()
    engine = LocalEngine(ScoringModule(model), [ParamGroup("reward", model, 1e-6, 1.0)], torch.device("cpu"))
    for seed in range(STEPS):
        step(engine, rankings(PROMPTS, k, seed), recipe, 0)
        engine.step(("reward",))
    return peak_memory_gb(torch.device("cpu"))


def main() -> None:
    """Print the table, or in a process of one K its peak."""
    given = [int(word) for word in sys.argv[1:]]
    if len(given) == 3:
        print("peak", peak(*given))
        return
    tokens, layers = [*given, *(1024, 0)[len(given) :]]
    print("| K | tokens of a prompt's outputs | rounds | peak |\n|---|---|---|---|")
    for k in OUTPUTS:
        command = [sys.executable, __file__, str(k), str(tokens), str(layers)]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found = next(float(line.split()[1]) for line in reversed(lines) if line.startswith("peak "))
        groups = rankings(PROMPTS, k)
        most = max(len(g.pairs) * max(g.lengths) for g in groups)
        rounds = " and ".join(map(str, sorted({2 - g.fits_one_pass(tokens) for g in groups})))
        print(f"| {k} | at most {most} | {rounds} | {found:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
