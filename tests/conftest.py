"""One thread for tests: their networks are so small that more only wait for each other."""

import gc
import os
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in processes started here


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make half a million objects that stay: looking for garbage among them takes a sixth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.enable()
