"""What a run leaves behind: its result, and the digests by which two runs are compared."""
