"""A block with its schedule and channels, by presentation; the loop that steps nodes."""
