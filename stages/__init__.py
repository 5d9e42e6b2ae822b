"""One readable program per stage: sft, rank, reward, ppo, evaluate."""
