"""What holds during every test: NaN in fresh memory, one thread, few and repeatable examples."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # counted when torch is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, on a GPU

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from fdfast.lean import Toolchain
from tests.lean_project import toolchains

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when fdfast.kernels is first imported

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "fdfast",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fdfast")


# Of the kernels' tests, these need no GPU's memory or speed: they read compiled code and tables.
_WITHOUT_GPU = ("test_kernels_compile.py", "test_kernels_cost.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The kernels' tests are marked `gpu`: they compute on one where there is one."""
    for item in items:
        name = item.path.name
        if name.startswith("test_kernels_") and name not in _WITHOUT_GPU:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _torch_as_tests_want_it() -> Iterator[None]:
    """torch.empty gives NaN (only the deterministic mode does that); one thread; all put back."""
    filled, threads = torch.utils.deterministic.fill_uninitialized_memory, torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def leans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Toolchain]:
    """Every kind of toolchain, ready to check: see tests/lean_project.py."""
    return toolchains(tmp_path_factory.mktemp("lean"))
