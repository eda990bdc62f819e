"""The proof: hamdist against oracles."""
