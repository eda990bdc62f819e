"""One block over several processes: how neurons are sliced, and what slices exchange."""
