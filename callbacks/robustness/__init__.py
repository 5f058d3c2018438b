"""Robustness callbacks; import them from :mod:`lightning_plugins.callbacks`."""
