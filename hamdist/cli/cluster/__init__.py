"""Commands for launched runs and clusters."""
