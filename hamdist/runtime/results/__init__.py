"""What a run leaves: its result, and the digests of its signals and weights."""
