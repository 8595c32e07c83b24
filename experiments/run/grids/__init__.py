"""Supervised patch classifiers over grids of patches: cutting, training, model on disk, prediction of slides."""
