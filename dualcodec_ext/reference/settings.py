"""The rules that the codec's settings keep: one copy for the reference model and `DualCodecConfig`."""

import math
from collections.abc import Mapping
from typing import Any

# What the distillation head ends in, whatever the settings: the width of w2v-BERT 2.0.
DISTILL_TARGET_DIM = 1024
DISTILL_LAYERS = 5
# What `rvq_search` holds; codes are stored as uint16.
MOST_ENTRIES = 65536
MOST_CODE_DIMS = 64

_POSITIVE_INTS = (
    "encoder_dim",
    "decoder_dim",
    "n_codebooks",
    "codebook_size",
    "semantic_codebook_size",
    "semantic_codebook_dim",
    "sample_rate",
    "distill_projection_out_dim",
    "convnext_dim",
    "semantic_downsample_factor",
    "semantic_dim",
    "convnext_intermediate_dim",
)
_FLAGS = ("decode_semantic_for_codec", "is_causal", "look_ahead", "causal_encoder", "distill")


_MOST = {
    "codebook_size": MOST_ENTRIES,
    "semantic_codebook_size": MOST_ENTRIES,
    "semantic_codebook_dim": MOST_CODE_DIMS,
}


def _positive_int(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = int(value.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"DualCodec: {name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"DualCodec: {name} must be at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        raise ValueError(f"DualCodec: {name} must be at most {maximum}, got {number}")
    return number


def _rates(name: str, value: Any) -> tuple[int, ...]:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        items = list(value)
    except TypeError:
        raise TypeError(f"DualCodec: {name} must be a list of integers, got {value!r}") from None
    if not items:
        raise ValueError(f"DualCodec: {name} must hold at least one rate, got {value!r}")
    return tuple(_positive_int(f"{name}[{i}]", item) for i, item in enumerate(items))


def _codebook_dim(value: Any, n_codebooks: int) -> int | tuple[int, ...]:
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return _positive_int("codebook_dim", value, maximum=MOST_CODE_DIMS)
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        items = list(value)
    except TypeError:
        raise TypeError(f"DualCodec: codebook_dim must be an integer or a list of them, got {value!r}") from None
    if len(items) != n_codebooks:
        raise ValueError(f"DualCodec: codebook_dim must hold n_codebooks={n_codebooks} entries, got {len(items)}")
    return tuple(_positive_int(f"codebook_dim[{i}]", item, maximum=MOST_CODE_DIMS) for i, item in enumerate(items))


def _dropout(value: Any) -> bool | float:
    if isinstance(value, bool):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"DualCodec: quantizer_dropout must be a fraction or a bool, got {value!r}") from None
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"DualCodec: quantizer_dropout must be in [0, 1], got {value!r}")
    return number


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the constructor arguments of `DualCodec` and bring them to plain types.

    Args:
        settings: every constructor argument by name.

    Returns:
        The same names with lists as tuples of int. None stays None (`resolve_settings` fills it).

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or values that do not fit each other.
    """
    out = dict(settings)
    for name in _POSITIVE_INTS:
        out[name] = _positive_int(name, out[name], maximum=_MOST.get(name))
    out["convnext_layers"] = _positive_int("convnext_layers", out["convnext_layers"], minimum=0)
    for name in _FLAGS:
        if not isinstance(out[name], bool):
            raise TypeError(f"DualCodec: {name} must be True or False, got {out[name]!r}")
    if out["latent_dim"] is not None:
        out["latent_dim"] = _positive_int("latent_dim", out["latent_dim"])
    if not (out["causal_decoder"] is None or isinstance(out["causal_decoder"], bool)):
        raise TypeError(f"DualCodec: causal_decoder must be True, False or None, got {out['causal_decoder']!r}")
    for name in ("encoder_rates", "decoder_rates"):
        out[name] = _rates(name, out[name])
    out["codebook_dim"] = _codebook_dim(out["codebook_dim"], out["n_codebooks"])
    out["quantizer_dropout"] = _dropout(out["quantizer_dropout"])

    encoder_hop, decoder_hop = math.prod(out["encoder_rates"]), math.prod(out["decoder_rates"])
    if encoder_hop != decoder_hop:
        raise ValueError(
            f"DualCodec: encoder_rates and decoder_rates must multiply to the same hop, got"
            f" {list(out['encoder_rates'])} = {encoder_hop} and {list(out['decoder_rates'])} = {decoder_hop}"
        )
    if out["decoder_dim"] < 2 ** len(out["decoder_rates"]):
        raise ValueError(
            f"DualCodec: decoder_dim is halved at every decoder rate and must be at least"
            f" {2 ** len(out['decoder_rates'])}, got {out['decoder_dim']}"
        )
    if out["look_ahead"] and out["causal_decoder"] is False:
        raise ValueError(
            "DualCodec: look_ahead=True needs the decoder with causal upsampling, got causal_decoder=False"
        )
    latent = latent_channels(out)
    if not out["decode_semantic_for_codec"] and out["convnext_dim"] != latent:
        raise ValueError(
            f"DualCodec: convnext_dim must equal latent_dim when decode_semantic_for_codec=False (the latent"
            f" is subtracted as it is), got convnext_dim={out['convnext_dim']} and latent_dim={latent}"
        )
    return out


def latent_channels(settings: Mapping[str, Any]) -> int:
    """Return the channels of the acoustic latent: `latent_dim`, or the encoder's last width."""
    if settings["latent_dim"] is not None:
        return int(settings["latent_dim"])
    return int(settings["encoder_dim"] * 2 ** len(settings["encoder_rates"]))


def decoder_is_causal(settings: Mapping[str, Any]) -> bool:
    """Return whether the decoder is the causal one: `causal_decoder`, or where it is None `look_ahead`."""
    if settings["causal_decoder"] is None:
        return bool(settings["look_ahead"])
    return bool(settings["causal_decoder"])


def resolve_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings and fill in those that are None."""
    out = check_settings(settings)
    return out | {"latent_dim": latent_channels(out), "causal_decoder": decoder_is_causal(out)}
