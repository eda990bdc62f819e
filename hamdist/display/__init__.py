"""Output for people: tables, curves and networks as pictures, the progress of runs."""
