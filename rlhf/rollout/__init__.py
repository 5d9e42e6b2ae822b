"""Episodes: sample responses, score them and turn them into experience."""
