"""Gastric screening: its stages, their data, its model on disk, its tables."""
