"""Streams around streams: pace, late targets, smooth changes, canvases, dtypes."""
