"""Evaluating distilled sets."""
