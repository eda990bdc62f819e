"""What all studies use: result folders, processes, recipes, limits."""
