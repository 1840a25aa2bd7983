"""What every test shares: no network, no telemetry, and skips that say why."""

import os
import signal
from collections.abc import Iterator

# Read by the libraries when they are imported, so set before the first import of any of them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import variants  # noqa: E402

variants.apply()


def pytest_runtest_setup() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests on a machine without a GPU; `-ra` prints the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none"))


@pytest.fixture
def plain_signals() -> Iterator[None]:
    """Ctrl+C and a closed terminal end processes, also where the tests were told to ignore them (`nohup ... &`)."""
    plain = {signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        plain[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
