"""Ready-made networks, and the model that a settings file names."""
