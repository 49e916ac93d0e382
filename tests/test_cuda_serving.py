"""A server whose model is on a GPU: one clip's codes and samples."""

from __future__ import annotations

import pytest
from gpu import DEVICE, needs_device

import dualcodec_ext as dx


@needs_device
def test_one_clip_on_a_device() -> None:
    pytest.importorskip("aiohttp")  # the extra `serve`
    from serving import CODEBOOKS, HOP, Place, check_pcm, decoded, play, voice

    moved, speech = dx.DualCodec.from_pretrained("tiny", device=DEVICE), voice()

    async def scenario(place: Place) -> None:
        async with place.client() as client:
            await client.hello()
            await client.send_pcm(speech, 777)
            await client.flush()
            got = await client.clip()
            frames = -(-len(speech) // HOP)
            assert got.codes.shape == (frames, CODEBOOKS)
            assert got.flushed == {"type": "flushed", "frames": frames, "samples": frames * HOP}
            check_pcm(got.pcm, decoded(moved, got.codes))

    play(moved, scenario)
