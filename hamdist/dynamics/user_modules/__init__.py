"""Python code of users' modules: copies, hooks, state beside weights, nested values."""
