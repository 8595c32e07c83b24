"""What the benchmark of gastric screening counts without running it."""

from experiments.run.benchmarks import screening as benchmark_screening
from srcc_jax.methods.gastric_screening import Config


def test_the_memory_of_a_gradient_grows_with_the_batch():
    one, four = (benchmark_screening.gradient_bytes(Config(model="tiny"), side=32, batch=batch) for batch in (1, 4))
    assert 0 < one < four


def test_rows_of_memory_say_both_sizes():
    (row,) = benchmark_screening.memory_rows("tiny", side=32, batch=2)
    assert row[0] == "tiny 32², batch 2: memory of the gradient with rematerialisation / without"
    small, large = (float(part.split()[0]) for part in row[3].split(" / "))
    assert small <= large and 0 < float(row[1]) <= 1.01
