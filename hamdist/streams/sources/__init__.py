"""Where items come from: arrays, data sets, text, drifting and generated signals."""
