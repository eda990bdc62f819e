"""Clusters that do not exist yet: throughput by the timing model, weights in one process."""
