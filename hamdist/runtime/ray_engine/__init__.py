"""The Ray engine: session, worker actors, their supervision and replacement."""
