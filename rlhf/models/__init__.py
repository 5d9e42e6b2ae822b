"""Find, build, load, save and place a transformers model."""
