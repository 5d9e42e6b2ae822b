"""The core that every stage shares: config, records, models, rollouts, scores, objectives, engine, runs."""

__version__ = "0.1.0"
