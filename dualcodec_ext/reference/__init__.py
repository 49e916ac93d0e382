"""The definition of DualCodec in plain PyTorch: the whole model, and one `<op>_ref` function per compiled op.

Read `model.py` for the codec as a whole, then `dac.py`, `quantize.py`, `layers.py`; `ops.py` holds the maths
of each op. It imports torch alone, and nothing else of the package.
"""

from .dac import DAC, Decoder, DecoderBlock, Encoder, EncoderBlock, OutputDict
from .layers import (
    CausalConv1d,
    CausalUpsample,
    ConvNeXtBlock,
    ResidualUnit,
    Snake1d,
    WNConv1d,
    WNConvTranspose1d,
)
from .model import DualCodec
from .ops import (
    causal_dwconv1d_ref,
    residual_unit_pair_ref,
    residual_unit_ref,
    rvq_lookup_ref,
    rvq_search_ref,
    snake_conv1d_ref,
    snake_upsample1d_pair_ref,
    snake_upsample1d_ref,
)
from .quantize import ResidualVectorQuantize, VectorQuantize

__all__ = [
    "DAC",
    "CausalConv1d",
    "CausalUpsample",
    "ConvNeXtBlock",
    "Decoder",
    "DecoderBlock",
    "DualCodec",
    "Encoder",
    "EncoderBlock",
    "OutputDict",
    "ResidualUnit",
    "ResidualVectorQuantize",
    "Snake1d",
    "VectorQuantize",
    "WNConv1d",
    "WNConvTranspose1d",
    "causal_dwconv1d_ref",
    "residual_unit_pair_ref",
    "residual_unit_ref",
    "rvq_lookup_ref",
    "rvq_search_ref",
    "snake_conv1d_ref",
    "snake_upsample1d_pair_ref",
    "snake_upsample1d_ref",
]
