"""The proof: comparisons of hamdist with oracles."""
