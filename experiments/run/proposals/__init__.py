"""Proposals of annotations: outlines of a model's maps for pathologists to correct, the most useful slides first."""
