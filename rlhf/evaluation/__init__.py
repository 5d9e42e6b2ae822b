"""Win rates, the alignment tax, held-out data, baselines, the report and comparisons of recipes."""
