"""One file for each section of a settings file."""
