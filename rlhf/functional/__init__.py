"""Formulas as pure functions: PPO, the ranking loss, statistics, agreement, judge odds, schedules and seeds."""
