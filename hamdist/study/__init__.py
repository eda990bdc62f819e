"""Comparisons, studies and proofs.

`run` (levels beside backpropagation), `report`, `sweep` (many runs), `gradient_descent` and
`propagation` (two studies of the papers' claims), `verify` (the proof)."""
