"""Studies as functions: `hamdist.compare`, `hamdist.verify`, `hamdist.study`, and their results."""
