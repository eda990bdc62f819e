"""A run that one can talk to: its handle, its journal."""
