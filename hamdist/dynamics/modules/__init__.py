"""torch modules for users: pre-norm, reversible and recurrent blocks."""
