"""Rules of learning: the interface `Rule` of a user's own, and the built-in ones, by name."""
