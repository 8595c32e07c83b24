"""Four CPU devices, strict ranks, and the folder of real data where there is one."""

import os
import pathlib

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# As the programs set it: a process that a test starts must compile what the test itself compiles, to the bit.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real slides, patches, weights and golden numbers. Absent: skipped on a desk, an error in CI."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs the folder of real data beside the checkout ({SHARED_DATA})")
        pytest.skip("the folder of real data (shared/data beside the checkout) is not here")
    return SHARED_DATA
