"""The state of blocks as plain data: what snapshots hold, and how it is put back."""
