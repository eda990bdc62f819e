"""What people look at: tables, curves and networks as pictures, the progress of runs."""
