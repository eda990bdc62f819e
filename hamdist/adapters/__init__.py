"""Estimators of other libraries around a live run: scikit_learn.py, river.py."""
