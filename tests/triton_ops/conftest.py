"""Triton's ops against the references: on a GPU as they ship, elsewhere in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own: tests/test_triton.py
starts one. Without it and without a GPU nothing is collected here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

import dualcodec_ext as dx

INTERPRETED = dx.build.triton_interprets()
DEVICE = "cpu" if INTERPRETED else "cuda"
CAN_RUN = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())

if not CAN_RUN:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    """Every op runs on Triton; torch's own thread pool only gets in the interpreter's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with dx.backend("triton"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    return DEVICE
