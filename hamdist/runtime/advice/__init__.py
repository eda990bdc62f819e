"""What the user is told before and after a run."""
