import copy

import pytest

from modmask_kernels.experiments import Run, get
from modmask_kernels.experiments.addmul_fnn import SMOKE
from modmask_kernels.report import Results
from modmask_kernels.report.html import draw_figures


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """A finished smoke run with two seeds, without its report."""
    path = tmp_path_factory.mktemp("runs") / "smoke"
    run = Run.create(path, get("addmul-fnn"), "smoke", SMOKE, [0, 1], threads=1)
    run.execute(progress=False)
    return run


@pytest.fixture(scope="session")
def drawings(smoke_run):
    """All figures of that run."""
    return draw_figures(get("addmul-fnn").page(Results.load(smoke_run.path)))


@pytest.fixture
def results(smoke_run):
    return copy.deepcopy(Results.load(smoke_run.path))
