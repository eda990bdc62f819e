"""How weights move: the constants of the equations, costates, averages, whitening, step size."""
