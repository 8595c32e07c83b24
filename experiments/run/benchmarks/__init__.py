"""What BENCHMARKS.md measures, section by section, with the peers in torch and other programs that it measures against."""
