"""Probabilities from a model, metrics from probabilities."""
