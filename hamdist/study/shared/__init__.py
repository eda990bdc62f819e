"""Parts that all studies use: result folders, processes, recipes, limits."""
