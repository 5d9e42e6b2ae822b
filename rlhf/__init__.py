"""The core of the pipeline, from the formulas up to the labelers: every stage is built from it."""

import os

# The Hub's client reads this when it is imported: no server is told what runs here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
