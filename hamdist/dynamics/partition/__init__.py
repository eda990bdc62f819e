"""From a model to a graph of blocks: where it is cut, and each block's settings."""
