"""dualcodec_ext: a fast, checked engine for the DualCodec neural speech codec."""

from . import ops, reference
from ._version import __version__
from .accelerate import accelerate
from .build import build_info, doctor
from .config import DualCodecConfig
from .errors import BackendError, DualCodecError, MissingExtraError
from .inference import Inference, get_model
from .model import DualCodec
from .ops import backend
from .streaming import StreamingDecoder, StreamingEncoder

__all__ = [
    "BackendError",
    "DualCodec",
    "DualCodecConfig",
    "DualCodecError",
    "Inference",
    "MissingExtraError",
    "StreamingDecoder",
    "StreamingEncoder",
    "__version__",
    "accelerate",
    "backend",
    "build_info",
    "doctor",
    "get_model",
    "ops",
    "reference",
]
