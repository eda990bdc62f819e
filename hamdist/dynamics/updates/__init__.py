"""Updates of weights: the constants of the equations, costates, averages, whitening, step size."""
