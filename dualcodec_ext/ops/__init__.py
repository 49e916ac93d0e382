"""The ops, each checked against its `_ref` in `dualcodec_ext.reference`."""

from . import packing as packing
from ._common import backend
from .causal_dwconv1d import causal_dwconv1d
from .residual_unit import residual_unit
from .residual_unit import residual_unit_pair as residual_unit_pair
from .rvq_lookup import rvq_lookup
from .rvq_search import RvqSearchStats as RvqSearchStats
from .rvq_search import rvq_search
from .rvq_search import rvq_search_stats as rvq_search_stats
from .snake_conv1d import snake_conv1d
from .snake_upsample1d import snake_upsample1d
from .snake_upsample1d import snake_upsample1d_pair as snake_upsample1d_pair

__all__ = [
    "backend",
    "causal_dwconv1d",
    "residual_unit",
    "rvq_lookup",
    "rvq_search",
    "snake_conv1d",
    "snake_upsample1d",
]
