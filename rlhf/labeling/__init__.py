"""Who ranks outputs: the rubric, a reward model, people or a language model."""
