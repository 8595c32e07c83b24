"""Cell detection: inference, training in rounds, its model on disk, regions cut from slides, evaluation, report."""
