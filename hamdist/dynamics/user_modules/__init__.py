"""What people's modules do in Python: copies, hooks, state beside weights, nested values."""
