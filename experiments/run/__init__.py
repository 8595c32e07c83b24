"""What the experiments share: flags of a config, work directory, signals, progress, scoring of slides, the finished model."""

import os

# TensorFlow reads these when it is imported, which only the stream does: no banner, no accelerator of its own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
