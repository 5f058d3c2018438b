"""Callbacks that make predicted probabilities mean what they say."""
