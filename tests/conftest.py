"""What test files share: the PyPI package's class, and full-size models that take a second to build."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from dualcodec_ext import reference
from dualcodec_ext.config import DualCodecConfig
from dualcodec_ext.peer import find_peer
from dualcodec_ext.testing import seeded_model


@pytest.fixture(scope="session")
def peer_class() -> type[Any]:
    """The PyPI package's DualCodec; the test is skipped where it can't be had."""
    found, text = find_peer()
    if found is None:
        pytest.skip(f"nothing to compare with: {text}")
    return found


@pytest.fixture(scope="session")
def preset_model() -> Callable[[str], reference.DualCodec]:
    """Builds the seeded reference model of a preset, in eval mode, not to be changed; one stays in memory."""

    @lru_cache(maxsize=1)
    def build(name: str) -> reference.DualCodec:
        return seeded_model(DualCodecConfig.preset(name).to_dict())

    return build


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Runs a file on one thread: with small tensors, more of them mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
