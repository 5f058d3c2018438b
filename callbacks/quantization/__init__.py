"""Callbacks of the quantization family."""
