"""The time that a run takes: steps and signals of a schedule on a cluster, measured or imagined."""
