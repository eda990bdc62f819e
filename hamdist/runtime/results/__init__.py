"""The result of a run, and the digests of its signals and weights."""
