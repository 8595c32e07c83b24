"""Reverse distillation: training, its model on disk, its report, patches cut at spots, teachers."""
