"""The same conditions for every test: offline, seeded, few threads, nothing written outside temporary folders."""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator

# Read once, when Transformers is first imported, and inherited by the processes that tests start.
_modules_cache = tempfile.TemporaryDirectory(prefix="xlstm_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_MODULES_CACHE"] = _modules_cache.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402
import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The tensors of the tests are small: more threads only wait for each other.
torch.set_num_threads(1)
# Read when the kernels are imported: without a GPU Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class _TorchRandom:
    """torch's generator as hypothesis wants it, so that every example starts from the same seed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile("house", derandomize=True, deadline=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def gpu() -> torch.device:
    """The CUDA device; a test that asks for it is marked `gpu`."""
    if not torch.cuda.is_available():
        pytest.skip("waits for a machine with a CUDA device")
    return torch.device("cuda")


@pytest.fixture
def kernel_device() -> Iterator[torch.device]:
    """Where Triton kernels run: a GPU, or the CPU through Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("waits for a machine that Triton is made for")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On the CPU this fills memory that nobody has written to with NaN: a kernel that leaves a hole is found.
    torch.use_deterministic_algorithms(device.type == "cpu")
    yield device
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = {"gpu", "kernel_device"} if torch.cuda.is_available() else {"gpu"}
    for item in items:
        if wanted.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("gpu")
