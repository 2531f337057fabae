"""The fixture `gpus`: a pretend pair of T4s for the launches of a file's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pretend_cuda
from pretend_cuda import build


@pytest.fixture(scope="module")
def gpus() -> Iterator[None]:
    if reason := build.why_not():
        pytest.skip(reason)
    with pretend_cuda.pair():
        yield
