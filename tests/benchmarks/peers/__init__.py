"""The peers' sides of the benchmarks. They run in environments of their own and never import rlhf."""
