"""The state of blocks as plain data: what snapshots hold; finite range of values."""
