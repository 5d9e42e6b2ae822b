"""The core that every stage shares: config, records, models, rollouts, scores, objectives, engine, runs."""

import os

os.environ.setdefault(
    "HF_HUB_DISABLE_TELEMETRY", "1"
)  # read when the Hub's client is imported; nobody's server is asked

__version__ = "0.1.0"
