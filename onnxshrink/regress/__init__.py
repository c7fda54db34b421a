"""Regression: what a run leaves for later, and whether a model still keeps it."""
