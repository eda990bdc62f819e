"""Studies: grids of runs, each side with settings chosen on a validation part.

settings   what a study's file holds
points     from it to cells (a side at a point of the grid) and their runs, each with a key
run        one run and its record; tuning runs, the choice, final runs
summary    means, spreads and gaps, by cell
tables, report: what is shown of it
"""
