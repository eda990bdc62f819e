"""From model, stream and settings to a trained model and its result."""
