"""The rows of `hamdist verify`, by topic."""
