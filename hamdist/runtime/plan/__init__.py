"""A run, worked out: dtypes, settings by block, heads, what every process needs to know."""
