"""Hard negative mining: what patches and slides it is given, the stages of a run, its results, ablations."""
