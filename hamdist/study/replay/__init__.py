"""The clock turned back: replays of recorded runs."""
