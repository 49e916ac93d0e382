"""The acoustic path: a waveform autoencoder (DAC) around a residual vector quantiser."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import MOST_SHORT_FRAMES
from .layers import (
    CausalUpsample,
    ConvNeXtBlock,
    ResidualUnit,
    Snake1d,
    WNConv1d,
    WNConvTranspose1d,
    make_conv,
)
from .quantize import Quantized, ResidualVectorQuantize
from .settings import DISTILL_LAYERS, DISTILL_TARGET_DIM


class OutputDict(dict[str, Any]):
    """A dict whose keys can also be read and set as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output named {name!r}, there are {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def pad_to_length(x: Tensor, length: int) -> Tensor:
    """Crop x [..., T] or pad it with zeros on the right, to `length` samples."""
    return F.pad(x, (0, max(0, length - x.shape[-1])))[..., :length]


class EncoderBlock(nn.Module):
    """Three residual units with growing dilation, then a strided convolution that doubles the channels."""

    def __init__(self, dim: int = 16, stride: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.block = nn.Sequential(
            ResidualUnit(dim // 2, dilation=1, causal=causal),
            ResidualUnit(dim // 2, dilation=3, causal=causal),
            ResidualUnit(dim // 2, dilation=9, causal=causal),
            Snake1d(dim // 2),
            make_conv(causal, dim // 2, dim, 2 * stride, padding=math.ceil(stride / 2), stride=stride),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, dim / 2, T] -> [B, dim, T / stride]
        return self.block(x)


class Encoder(nn.Module):
    """Waveform to latent: [B, 1, T] -> [B, d_latent, T / hop], T a multiple of the hop."""

    def __init__(
        self,
        d_model: int = 64,
        strides: Sequence[int] = (2, 4, 8, 8),
        d_latent: int = 64,
        causal: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [make_conv(causal, 1, d_model, 7, padding=3)]
        for stride in strides:
            d_model *= 2
            layers.append(EncoderBlock(d_model, stride, causal))
        layers += [Snake1d(d_model), make_conv(causal, d_model, d_latent, 3, padding=1)]
        self.block = nn.Sequential(*layers)
        self.enc_dim = d_model

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DecoderBlock(nn.Module):
    """Snake, upsampling by `stride`, then three residual units with growing dilation."""

    def __init__(
        self,
        input_dim: int = 16,
        output_dim: int = 8,
        stride: int = 1,
        causal: bool = False,
        look_ahead: bool = False,
    ) -> None:
        super().__init__()
        upsample: nn.Module
        if causal:
            upsample = CausalUpsample(input_dim, output_dim, stride, look_ahead)  # T -> T stride
        else:  # T -> T stride, less one sample for an odd stride
            upsample = WNConvTranspose1d(input_dim, output_dim, 2 * stride, stride, padding=math.ceil(stride / 2))
        self.block = nn.Sequential(
            Snake1d(input_dim),
            upsample,
            ResidualUnit(output_dim, dilation=1, causal=causal),
            ResidualUnit(output_dim, dilation=3, causal=causal),
            ResidualUnit(output_dim, dilation=9, causal=causal),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Decoder(nn.Module):
    """Latent to waveform: [B, input_channel, F] -> [B, d_out, about F hop] in [-1, 1].

    Args:
        input_channel: channels of the latent.
        channels: channels behind the first convolution, halved by every block.
        rates: the upsampling strides.
        d_out: output channels.
        causal: False: centred convolutions and transposed ones (`centred_length` samples out). True:
            convolutions padded on the left alone, and nearest-repeat with a convolution for upsampling
            (exactly F hop samples).
        look_ahead: lets the causal decoder's upsampling see a bounded stretch of future.
    """

    def __init__(
        self,
        input_channel: int,
        channels: int,
        rates: Sequence[int],
        d_out: int = 1,
        causal: bool = False,
        look_ahead: bool = False,
    ) -> None:
        super().__init__()
        if look_ahead and not causal:
            raise ValueError("Decoder: look_ahead=True needs causal=True, got causal=False")
        layers: list[nn.Module] = [make_conv(causal, input_channel, channels, 7, padding=3)]
        for i, stride in enumerate(rates):
            layers.append(DecoderBlock(channels // 2**i, channels // 2 ** (i + 1), stride, causal, look_ahead))
        last = channels // 2 ** len(rates)
        layers += [Snake1d(last), make_conv(causal, last, d_out, 7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class DAC(nn.Module):
    """Encoder, residual vector quantiser and decoder. `subtracted_latent` is what the semantic path has said
    already: it is taken off the encoder's latent before quantisation and added back behind it.
    """

    def __init__(
        self,
        encoder_dim: int = 64,
        encoder_rates: Sequence[int] = (2, 4, 8, 8),
        latent_dim: int | None = None,
        decoder_dim: int = 1536,
        decoder_rates: Sequence[int] = (8, 8, 4, 2),
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | Sequence[int] = 8,
        quantizer_dropout: bool | float = False,
        sample_rate: int = 44100,
        distill_projection_out_dim: int = 1024,
        distill: bool = False,
        convnext_intermediate_dim: int = 2048,
        causal_encoder: bool = False,
        causal_decoder: bool = False,
        look_ahead: bool = False,
    ) -> None:
        super().__init__()
        if latent_dim is None:
            latent_dim = encoder_dim * 2 ** len(encoder_rates)
        self.encoder_dim, self.encoder_rates = encoder_dim, encoder_rates
        self.decoder_dim, self.decoder_rates = decoder_dim, decoder_rates
        self.latent_dim, self.sample_rate = latent_dim, sample_rate
        self.n_codebooks, self.codebook_size, self.codebook_dim = n_codebooks, codebook_size, codebook_dim
        self.hop_length = math.prod(encoder_rates)
        self.encoder = Encoder(encoder_dim, encoder_rates, latent_dim, causal_encoder)
        self.quantizer = ResidualVectorQuantize(
            latent_dim, n_codebooks, codebook_size, codebook_dim, float(quantizer_dropout)
        )
        self.decoder = Decoder(latent_dim, decoder_dim, decoder_rates, 1, causal_decoder, look_ahead)
        # The PyPI package also draws these convolutions' weights from a truncated normal, but writes it to
        # the product that weight norm recomputes on the next call, so only the biases of plain convolutions
        # are changed by it.
        for module in self.modules():
            if isinstance(module, WNConv1d):
                nn.init.zeros_(module.bias)
        self.distill = distill
        if distill:
            width = distill_projection_out_dim
            self.distill_projection = WNConv1d(latent_dim, width, kernel_size=1)
            self.convnext = nn.Sequential(
                *[ConvNeXtBlock(width, convnext_intermediate_dim) for _ in range(DISTILL_LAYERS)],
                WNConv1d(width, DISTILL_TARGET_DIM, kernel_size=1),
            )

    def check_rate(self, sample_rate: int | None) -> None:
        """Raise unless sample_rate, in Hz, is the model's, or None."""
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise ValueError(f"DualCodec: sample_rate must be the model's {self.sample_rate} Hz, got {sample_rate}")

    def preprocess(self, audio: Tensor, sample_rate: int | None) -> Tensor:
        """Check the rate (None: the model's) and pad audio [B, 1, S] with zeros to a multiple of the hop."""
        self.check_rate(sample_rate)
        return F.pad(audio, (0, -audio.shape[-1] % self.hop_length))

    def check_framing(self, samples: int, frames: int) -> None:
        """Raise unless there are ceil(samples / hop) frames of features, or up to 2 fewer."""
        own = -(-samples // self.hop_length)
        if frames > own or own - frames > MOST_SHORT_FRAMES:
            raise ValueError(
                f"DualCodec: semantic_repr must have ceil({samples} / {self.hop_length}) = {own} frames or"
                f" up to {MOST_SHORT_FRAMES} fewer, got {frames}"
            )

    def _residual(self, audio: Tensor, subtracted_latent: Tensor | None) -> Tensor:  # [B, latent_dim, F]
        z = self.encoder(audio)
        if subtracted_latent is None:
            return z
        self.check_framing(audio.shape[-1], subtracted_latent.shape[-1])
        return z[..., : subtracted_latent.shape[-1]] - subtracted_latent

    def encode(
        self,
        audio_data: Tensor,
        sample_rate: int | None = 24000,
        n_quantizers: int | None = None,
        subtracted_latent: Tensor | None = None,
    ) -> Quantized:
        """Encode audio_data [B, 1, S]; returns what the quantiser returns, subtracted_latent added to z."""
        if self.training:
            raise RuntimeError("DAC.encode: the model must be in eval mode, got training mode: call .eval() first")
        residual = self._residual(self.preprocess(audio_data, sample_rate), subtracted_latent)
        z, *rest = self.quantizer(residual, n_quantizers)
        return z if subtracted_latent is None else z + subtracted_latent, *rest

    def decode_from_codes(self, acoustic_codes: Tensor | None, semantic_latent: Tensor) -> Tensor:
        """Decode acoustic_codes [B, q, F] (or None) plus semantic_latent [B, latent_dim, F] to [B, 1, S']."""
        z = semantic_latent
        if acoustic_codes is not None:
            z = self.quantizer.from_codes(acoustic_codes)[0] + z
        return self.decoder(z)

    def forward(
        self,
        audio_data: Tensor,
        sample_rate: int | None = None,
        n_quantizers: int | None = None,
        subtracted_latent: Tensor | None = None,
        bypass_quantize: bool = False,
        possibly_no_quantizer: bool = False,
    ) -> OutputDict:
        """Encode, quantise and decode audio_data [B, 1, S]; see `DualCodec.forward` for what it returns."""
        residual = self._residual(self.preprocess(audio_data, sample_rate), subtracted_latent)
        codes = latents = first = None
        commitment_loss: Tensor | float = 0.0
        codebook_loss: Tensor | float = 0.0
        if bypass_quantize:
            z = torch.zeros_like(residual)
        else:
            z, codes, latents, commitment_loss, codebook_loss, first = self.quantizer(
                residual, n_quantizers, possibly_no_quantizer
            )
        if subtracted_latent is not None:
            z = z + subtracted_latent
        x = pad_to_length(self.decoder(z), audio_data.shape[-1])
        if self.distill and first is not None:
            first = self.convnext(self.distill_projection(first))
        return OutputDict(
            {
                "x": x,
                "z": z,
                "codes": codes,
                "latents": latents,
                "penalty": commitment_loss,
                "vq/codebook_loss": codebook_loss,
                "metrics": {},
                "first_layer_quantized": first,
            }
        )
