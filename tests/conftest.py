"""Fixtures of all tests: every instruction set that this machine runs, and the two modes."""

from importlib.util import find_spec

import numpy as np
import pytest
from oracle import CACHES

import bn_c
from bn_c import _core, _dispatch, _threads


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="try far more: all places, more examples, longer runs")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes where the CPU is emulated")
    # A kernel or a conversion that overflows on its way to a right result would warn.
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")
    # A call uses no more threads than there are CPUs, and for large arrays alone: no test of threads would have any.
    _threads._cpus = lambda: 4
    _core.wake_threads_from(1)
    if find_spec("hypothesis"):
        load_profile(config.getoption("--thorough"))


def load_profile(thorough):
    """The same few examples in every run, or many new ones."""
    from hypothesis import HealthCheck, settings

    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("suite", derandomize=True, max_examples=100, **quiet)
    settings.register_profile("thorough", max_examples=20_000, **quiet)
    settings.load_profile("thorough" if thorough else "suite")


def pytest_report_header():
    built = [isa for isa in _dispatch.ISAS if find_spec(f"bn_c._kernels_{isa}")]
    runs = bn_c.supported_isas()
    return (
        f"bn_c: {len(runs)} of {len(built)} instruction sets of this build run on this machine: "
        f"{', '.join(runs)}; {bn_c.isa} by default"
    )


@pytest.fixture(params=bn_c.supported_isas())
def isa(request):
    """Each instruction set in turn."""
    _dispatch.use(request.param)
    yield request.param
    _dispatch.use(bn_c.isa)


@pytest.fixture(params=CACHES, ids=["in caches", "in memory"])
def caches(isa, request):
    """Arrays are taken to be there: what is in memory is asked for early, and y is written past the caches."""
    _dispatch.use(isa, request.param)


@pytest.fixture
def thorough(request):
    """Whether time does not matter."""
    return request.config.getoption("--thorough")


@pytest.fixture(params=[True, False], ids=["batch", "inference"])
def batch(request):
    """Whether the statistics are those of the mini-batch or given ones."""
    return request.param


@pytest.fixture
def rng():
    """The same random numbers in every test."""
    return np.random.default_rng(1502_03167)
