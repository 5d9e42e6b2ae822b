"""What each sub-command of `rlhf` does, one module a command."""
