"""Losses, the outputs they belong to, and prequential scores."""
