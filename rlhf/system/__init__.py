"""This process, its siblings and its machine: console, ranks, signals, files, logs, watchdog and timers."""
