"""Figures of features and of attention, as PNG files."""
