"""What the benchmark of gastric screening counts without running it."""

from experiments.run.benchmarks import screening as benchmark_screening
from srcc_jax.methods.gastric_screening import Config


def test_what_is_kept_for_the_gradient_grows_with_the_batch():
    one, four = (benchmark_screening.kept_bytes(Config(model="tiny"), side=32, batch=batch) for batch in (1, 4))
    assert 0 < one < four


def test_rematerialisation_keeps_less():
    (row,) = benchmark_screening.memory_rows("tiny", side=32, batch=16)
    assert row[0] == "tiny 32², batch 16: kept for the gradient with rematerialisation / without"
    assert 0 < float(row[1]) < 0.8
