"""DualCodec: a semantic path that codes speech features, and an acoustic path that codes what they leave
unsaid.

feat [B, semantic_dim, F] -> convnext_encoder -> semantic_vq -> convnext_decoder -> s [B, latent_dim, F]
audio [B, 1, S] -> dac.encoder -> z [B, latent_dim, F] - s -> dac.quantizer -> q        (q codes what z has
beyond s) q + s -> dac.decoder -> audio
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import MOST_SHORT_FRAMES, check_codes, check_count, check_lengths, check_waves, naming_wrong_codes
from .dac import DAC, OutputDict
from .layers import ConvNeXtBlock, WNConv1d
from .long_clips import LongClips
from .ops import mask_past_lengths
from .quantize import Quantized, ResidualVectorQuantize
from .settings import resolve_settings


class DualCodec(LongClips, nn.Module):
    """The whole codec in plain PyTorch. Parameters, names and defaults are the PyPI package's, then ours.

    Args:
        encoder_dim: channels behind the acoustic encoder's first convolution; doubled at every rate.
        encoder_rates: its downsampling strides; their product is the hop, in samples per frame.
        latent_dim: channels of the acoustic latent. None: encoder_dim * 2**len(encoder_rates).
        decoder_dim: channels behind the decoder's first convolution; halved at every rate.
        decoder_rates: its upsampling strides; their product must be the hop as well.
        n_codebooks: stages of the acoustic quantiser.
        codebook_size: entries of each acoustic codebook, up to 65536.
        semantic_codebook_size: entries of the semantic codebook, up to 65536.
        codebook_dim: code space of the acoustic stages, up to 64, one number or one per stage.
        semantic_codebook_dim: code space of the semantic codebook, up to 64.
        quantizer_dropout: fraction of the batch whose number of acoustic stages is drawn at random in
            training.
        sample_rate: Hz.
        distill_projection_out_dim: channels of the distillation head's blocks (used when distill=True).
        convnext_dim: channels of the semantic path.
        convnext_layers: ConvNeXt blocks before and behind the semantic codebook.
        decode_semantic_for_codec: subtract and add the decoded semantic latent (True), or the un-decoded one.
        is_causal: causal ConvNeXt blocks in the semantic path; the acoustic path does not follow it.
        semantic_downsample_factor: how many w2v-BERT frames (50 Hz) make one of feat; read by `Inference`.
        look_ahead: let the causal decoder's upsampling see a bounded stretch of future.
        causal_decoder: the decoder that sees no future (None: as look_ahead).
        causal_encoder: the encoder that sees no future.
        distill: add the head that predicts semantic features from the first acoustic codebook.
        semantic_dim: channels of the semantic features.
        convnext_intermediate_dim: inner width of every ConvNeXt block.

    Raises:
        TypeError, ValueError: a setting that is wrong or does not fit the others; one line.
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
        semantic_codebook_size: int = 16384,
        codebook_dim: int | Sequence[int] = 8,
        semantic_codebook_dim: int = 8,
        quantizer_dropout: bool | float = False,
        sample_rate: int = 44100,
        distill_projection_out_dim: int = 1024,
        convnext_dim: int = 768,
        convnext_layers: int = 4,
        decode_semantic_for_codec: bool = True,
        is_causal: bool = False,
        semantic_downsample_factor: int = 2,
        look_ahead: bool = False,
        causal_decoder: bool | None = None,
        causal_encoder: bool = False,
        distill: bool = False,
        semantic_dim: int = 1024,
        convnext_intermediate_dim: int = 2048,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        # Every constructor argument by name, with latent_dim and causal_decoder filled in.
        self.settings = cfg = resolve_settings(given)
        self.semantic_downsample_factor = cfg["semantic_downsample_factor"]
        self.decode_semantic_for_codec = decode_semantic_for_codec
        self.encoder_rates = cfg["encoder_rates"]
        self.dac = DAC(
            cfg["encoder_dim"],
            cfg["encoder_rates"],
            cfg["latent_dim"],
            cfg["decoder_dim"],
            cfg["decoder_rates"],
            cfg["n_codebooks"],
            cfg["codebook_size"],
            cfg["codebook_dim"],
            cfg["quantizer_dropout"],
            cfg["sample_rate"],
            cfg["distill_projection_out_dim"],
            distill=distill,
            convnext_intermediate_dim=cfg["convnext_intermediate_dim"],
            causal_encoder=causal_encoder,
            causal_decoder=cfg["causal_decoder"],
            look_ahead=look_ahead,
        )
        width, inner = cfg["convnext_dim"], cfg["convnext_intermediate_dim"]

        def blocks() -> list[nn.Module]:
            return [ConvNeXtBlock(width, inner, is_causal) for _ in range(cfg["convnext_layers"])]

        self.convnext_encoder = nn.Sequential(WNConv1d(cfg["semantic_dim"], width, kernel_size=1), *blocks())
        self.semantic_vq = ResidualVectorQuantize(width, 1, cfg["semantic_codebook_size"], cfg["semantic_codebook_dim"])
        self.convnext_decoder = nn.Sequential(*blocks(), WNConv1d(width, cfg["latent_dim"], kernel_size=1))

    def _semantic(self, semantic_repr: Tensor) -> tuple[Tensor, Quantized]:
        """Quantise feat [B, semantic_dim, F]; returns the latent to subtract, and what the quantiser gave."""
        quantized = self.semantic_vq(self.convnext_encoder(semantic_repr))
        latent = quantized[0]  # [B, convnext_dim, F]
        return self.convnext_decoder(latent) if self.decode_semantic_for_codec else latent, quantized

    @torch.no_grad()
    def semantic_quantize(self, semantic_repr: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the semantic codes [B, F] int64 of semantic_repr [B, semantic_dim, F] float.

        Args:
            semantic_repr: the features.
            lengths: [B] int64, valid frames per item; codes past them are 0.
        """
        feat = self._check_features("DualCodec.semantic_quantize", semantic_repr)
        if lengths is not None:
            check_lengths("DualCodec.semantic_quantize", lengths, feat)
        return self._encode(None, feat, 1, None, lengths)[0][:, 0]

    @torch.no_grad()
    def encode(
        self,
        audio_data: Tensor,
        num_quantizers: int | None = None,
        sample_rate: int | None = 24000,
        semantic_repr: Tensor | None = None,
        lengths: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        chunk_frames: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn speech into codes.

        Args:
            audio_data: [B, 1, S] float in [-1, 1]; padded with zeros to ceil(S / hop) frames.
            num_quantizers: codebooks to use, the semantic one included: 1 gives no acoustic codes (and does
                not look at the audio), None or more than there are gives all.
            sample_rate: Hz of audio_data, which must be the model's (None: taken to be).
            semantic_repr: [B, semantic_dim, F] float; F is ceil(S / hop) or up to 2 fewer, and rules the
                output. None: a `DualCodec` on log-mel features computes its own.
            lengths: [B] int64, valid samples per item: it is coded as if alone, with the first ceil(length /
                hop) of the frames in semantic_repr; codes past those are 0.
            feature_lengths: [B] int64, with `lengths`: valid frames of semantic_repr per item, up to 2 fewer than that.
            chunk_frames: codes that are computed at a time, in memory that does not grow with the clip; None: the
                model's choice. It changes no code (the reference's: within the rounding of its convolutions).

        Returns:
            Semantic codes [B, 1, F] int64, and acoustic codes [B, q, F] int64 or None.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: a wrong shape, rate or count; one line.
        """
        name = "DualCodec.encode"
        if self.training:
            raise RuntimeError(f"{name}: the model must be in eval mode, got training mode: call .eval()")
        if num_quantizers is not None:
            num_quantizers = check_count(f"{name}: num_quantizers", num_quantizers)
        if chunk_frames is not None:
            chunk_frames = check_count(f"{name}: chunk_frames", chunk_frames)
        if semantic_repr is None:
            semantic_repr = self._own_features(name, audio_data, lengths)
        feat = self._check_features(name, semantic_repr)
        frame_lengths = None
        if num_quantizers != 1 or lengths is not None:
            self._check_audio(name, audio_data, feat)
            self.dac.check_rate(sample_rate)
        if num_quantizers is not None:
            num_quantizers = min(num_quantizers, 1 + self.dac.n_codebooks)
        if lengths is not None:
            check_lengths(name, lengths, audio_data)
            frame_lengths = self._frame_lengths(name, lengths, feature_lengths, feat)
        elif feature_lengths is not None:
            raise ValueError(f"{name}: feature_lengths needs lengths, the samples of each item")
        if chunk_frames is None or chunk_frames >= feat.shape[-1]:
            return self._encode(audio_data, feat, num_quantizers, lengths, frame_lengths)
        return self._encode_long(audio_data, feat, num_quantizers, lengths, frame_lengths, chunk_frames)

    def _own_features(self, name: str, audio_data: Tensor, lengths: Tensor | None) -> Tensor | None:
        return None  # the plain modules have no front end

    def _frame_lengths(self, name: str, lengths: Tensor, feature_lengths: Tensor | None, feat: Tensor) -> Tensor:
        hop, frames = self.dac.hop_length, feat.shape[-1]
        own = ((lengths + hop - 1) // hop).clamp(max=frames)
        if feature_lengths is None:
            return own
        check_lengths(name, feature_lengths, feat, "feature_lengths")
        if ((own - feature_lengths < 0) | (own - feature_lengths > MOST_SHORT_FRAMES)).any():
            raise ValueError(
                f"{name}: feature_lengths must be ceil(lengths / {hop}) = {own.tolist()} or up to"
                f" {MOST_SHORT_FRAMES} fewer, got {feature_lengths.tolist()}"
            )
        return feature_lengths

    def _whole_frames(self, audio: Tensor, sample_lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Put zeros past each clip's samples, up to whole frames; returns the lengths of those."""
        if sample_lengths is not None:
            audio = mask_past_lengths(audio, sample_lengths)
            hop = self.dac.hop_length
            sample_lengths = (sample_lengths + hop - 1) // hop * hop
        return self.dac.preprocess(audio, None), sample_lengths

    def _encode(
        self,
        audio: Tensor | None,  # [B, 1, S], of any S; what lies past a clip's own samples counts as zeros
        feat: Tensor,  # [B, semantic_dim, F]
        num_quantizers: int | None,  # 1 to 1 + n_codebooks; audio is read unless it is 1
        sample_lengths: Tensor | None,  # [B] int64, or None
        frame_lengths: Tensor | None,  # [B] int64, or None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode arguments that have been checked."""
        if audio is not None and num_quantizers != 1:
            audio, sample_lengths = self._whole_frames(audio, sample_lengths)
        if frame_lengths is not None:
            samples = frame_lengths if sample_lengths is None else sample_lengths
            semantic, acoustic = [], []
            for i, (s, n) in enumerate(zip(samples.tolist(), frame_lengths.tolist(), strict=True)):
                item = None if audio is None else audio[i : i + 1, :, :s]
                sem, ac = self._encode(item, feat[i : i + 1, :, :n], num_quantizers, None, None)
                semantic.append(sem)
                acoustic.append(sem[:, :0] if ac is None else ac)
            empty = feat.new_zeros(0, 1, feat.shape[-1], dtype=torch.int64)
            stages = self.dac.n_codebooks if num_quantizers is None else num_quantizers - 1
            codes = pad_items(acoustic, empty.expand(0, stages, -1)) if stages else None
            return pad_items(semantic, empty), codes
        if audio is None or num_quantizers == 1:
            return self.semantic_vq(self.convnext_encoder(feat))[1], None
        latent, semantic_quantized = self._semantic(feat)
        acoustic_quantizers = None if num_quantizers is None else num_quantizers - 1
        return semantic_quantized[1], self.dac.encode(audio, None, acoustic_quantizers, latent)[1]

    @torch.no_grad()
    def decode_from_codes(
        self,
        semantic_codes: Tensor,
        acoustic_codes: Tensor | None = None,
        lengths: Tensor | None = None,
        chunk_frames: int | None = None,
    ) -> Tensor:
        """Turn codes into speech.

        Args:
            semantic_codes: [B, 1, F] integers in [0, semantic_codebook_size).
            acoustic_codes: [B, q, F] integers in [0, codebook_size), the first q codebooks, q up to
                n_codebooks; None decodes the semantic codes alone.
            lengths: [B] int64, valid frames per item: it is decoded as if alone, samples past its own end are
                0.
            chunk_frames: frames that are decoded at a time, in memory that does not grow with the clip; None: the
                model's choice. It changes no sample (the reference's: within the rounding of its convolutions).

        Returns:
            Audio [B, 1, S']: F hop samples from the causal decoder, a few fewer from the centred one (one for
            each odd rate, times the rates behind it).

        Raises:
            ValueError: a wrong shape, or a code out of range; one line.
        """
        name = "DualCodec.decode_from_codes"
        if chunk_frames is not None:
            chunk_frames = check_count(f"{name}: chunk_frames", chunk_frames)
        semantic_codes, acoustic_codes = check_codes(name, semantic_codes, acoustic_codes, self.dac.n_codebooks)
        if lengths is not None:
            check_lengths(name, lengths, semantic_codes)
        with naming_wrong_codes(name, semantic_codes, acoustic_codes, self._entries(), lengths):
            if chunk_frames is None or chunk_frames >= semantic_codes.shape[-1]:
                return self._decode(semantic_codes, acoustic_codes, lengths)
            return self._decode_long(semantic_codes, acoustic_codes, lengths, chunk_frames)

    def _decode(
        self,
        semantic_codes: Tensor,  # [B, 1, F] integers
        acoustic_codes: Tensor | None,  # [B, q, F] integers, q at least 1
        frame_lengths: Tensor | None,  # [B] int64, or None
    ) -> Tensor:
        """Decode arguments that have been checked, but for the range of the codes."""
        if frame_lengths is not None:
            items = []
            for i, n in enumerate(frame_lengths.tolist()):
                item = None if acoustic_codes is None else acoustic_codes[i : i + 1, :, :n]
                items.append(self._decode(semantic_codes[i : i + 1, :, :n], item, None))
            samples = self.output_samples(semantic_codes.shape[-1])
            return pad_items(items, next(self.dac.parameters()).new_zeros(0, 1, samples))
        latent = self.semantic_vq.from_codes(semantic_codes)[0]
        if self.decode_semantic_for_codec:
            latent = self.convnext_decoder(latent)
        return self.dac.decode_from_codes(acoustic_codes, latent)

    def forward(
        self,
        audio_data: Tensor,
        sample_rate: int | None = 24000,
        n_quantizers: int | None = None,
        semantic_repr: Tensor | None = None,
        bypass_quantize_rate: float = 0.125,
        possibly_no_quantizer: bool = False,
    ) -> tuple[OutputDict, OutputDict]:
        """Run the training forward.

        Args:
            audio_data: [B, 1, S] float.
            sample_rate: Hz of audio_data, which must be the model's (None: taken to be).
            n_quantizers: codebooks to use outside training, the semantic one included; 1 also bypasses the
                acoustic quantiser in training.
            semantic_repr: [B, semantic_dim, F] float; F is ceil(S / hop) or up to 2 fewer.
            bypass_quantize_rate: how often training decodes the semantic latent alone (drawn from `random`).
            possibly_no_quantizer: lets quantizer_dropout leave no stage at all.

        Returns:
            Two mappings, readable by key and by attribute.
            Acoustic: x [B, 1, S] audio, z [B, latent_dim, F] what was decoded, codes [B, q, F], latents
            [B, sum of code dims, F], penalty (commitment loss), "vq/codebook_loss", metrics,
            first_layer_quantized [B, latent_dim, F], or with distill=True the head's output [B, 1024, F].
            Bypassed: codes, latents and first_layer_quantized are None, the losses 0.0.
            Semantic: x [B, latent_dim, F] the decoded semantic latent, codes [B, 1, F], latents, penalty,
            "vq/codebook_loss", metrics, bypassed_quantize.
        """
        feat = self._check_features("DualCodec", semantic_repr)
        self._check_audio("DualCodec", audio_data, feat)
        latent, (_, codes, latents, commitment_loss, codebook_loss, _) = self._semantic(feat)
        bypass = random.random() < bypass_quantize_rate and self.training  # drawn in eval mode too, as upstream draws
        bypass = bypass or n_quantizers == 1
        acoustic = self.dac(
            audio_data,
            sample_rate,
            None if n_quantizers is None else n_quantizers - 1,
            subtracted_latent=latent,
            bypass_quantize=bypass,
            possibly_no_quantizer=possibly_no_quantizer,
        )
        if not self.decode_semantic_for_codec:
            latent = self.convnext_decoder(latent)
        semantic = OutputDict(
            {
                "x": latent,
                "codes": codes,
                "latents": latents,
                "penalty": commitment_loss,
                "vq/codebook_loss": codebook_loss,
                "metrics": {},
                "bypassed_quantize": bypass,
            }
        )
        return acoustic, semantic

    def output_samples(self, frames: int) -> int:
        """Return the samples that decoding `frames` frames gives."""
        if frames == 0 or self.settings["causal_decoder"]:
            return frames * self.dac.hop_length
        samples = frames
        for rate in self.settings["decoder_rates"]:
            samples = max(0, samples * rate - rate % 2)
        return samples

    def _check_features(self, name: str, feat: Tensor | None) -> Tensor:
        width = self.settings["semantic_dim"]
        if not isinstance(feat, Tensor):
            got = None if feat is None else type(feat).__name__
            raise ValueError(f"{name}: semantic_repr must be [B, {width}, F], got {got}")
        if feat.dim() != 3 or feat.shape[1] != width or not feat.is_floating_point():
            raise ValueError(
                f"{name}: semantic_repr must be [B, {width}, F] float, got {list(feat.shape)} {feat.dtype}"
            )
        return feat

    def _check_audio(self, name: str, audio: Tensor, feat: Tensor) -> None:
        check_waves(name, "audio_data", audio, feat.shape[0])
        self.dac.check_framing(audio.shape[-1], feat.shape[-1])


def pad_items(items: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Put items [1, ..., T_i] into one batch [B, ..., T], zeros behind each; empty [0, ..., T] gives T."""
    padded = [nn.functional.pad(item, (0, empty.shape[-1] - item.shape[-1])) for item in items]
    return torch.cat([empty, *padded]) if padded else empty
