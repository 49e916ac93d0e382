"""The PyPI package's model class, for the tests that compare with it; None where it is not installed."""

from dualcodec_ext.peer import find_peer, load_peer

__all__ = ["find_peer", "load_peer"]
