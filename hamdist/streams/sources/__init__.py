"""Sources of samples: arrays, data sets, text, drifting and generated signals."""
