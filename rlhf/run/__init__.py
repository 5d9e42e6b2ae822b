"""The frame of a stage: run folder, fingerprints, preflight checks, checkpoints, tracking and run_stage."""
