"""The signals that ask a stage to stop, and the exit codes that say it did."""

import signal

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is Slurm's warning that the time is nearly up
STOPPED = tuple(128 + number for number in STOPPING)
