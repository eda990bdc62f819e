"""Sources of items: arrays, data sets, text, drifting and generated signals."""
