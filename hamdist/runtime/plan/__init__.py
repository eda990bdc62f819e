"""The plan of a run: dtypes, settings by block, heads, everything that all processes share."""
