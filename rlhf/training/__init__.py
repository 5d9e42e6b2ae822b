"""Training engines, the networks and state of PPO, the passes of the reward model and the SFT trainer."""
