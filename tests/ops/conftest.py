import pytest
import torch

from modmask_kernels import _native


@pytest.fixture(params=_native.capabilities() or ["reference"])
def capability(request):
    """Runs the test with every CPU capability of this machine."""
    if not _native.available():
        yield request.param
        return
    before = _native.capability()
    _native.set_capability(request.param)
    yield request.param
    _native.set_capability(before)


@pytest.fixture
def threads():
    """Sets the number of threads and restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
