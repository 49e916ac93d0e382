"""Instruction sets: what each unit's code may hold, and bfloat16 with and without its own instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import opsuite as suite
import pytest
import torch

import dualcodec_ext as dx
from dualcodec_ext import build, ops, steps
from dualcodec_ext.engine import Engine
from dualcodec_ext.ops import packing

# Instructions by what they need: register names, bfloat16 products and conversions, products of bytes, and tiles.
NEEDS = {
    "AVX-512": re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b"),
    "AVX": re.compile(r"%ymm"),
    "AVX512-BF16": re.compile(r"\bvdpbf16ps|\bvcvtne2?ps2bf16|\bvcvtneps2bf16"),
    "VNNI": re.compile(r"\bvpdp(busd|wssd)s?\b"),
    "AMX": re.compile(r"%tmm|\b(ldtilecfg|tilerelease)\b"),
}
MAY = {
    "AVX-512": ("dcx::avx512::", "dcx::avx512_bf16::", "dcx::amx_bf16::"),
    "AVX": ("dcx::avx2::", "dcx::avx512::", "dcx::avx512_bf16::", "dcx::amx_bf16::"),
    "AVX512-BF16": ("dcx::avx512_bf16::", "dcx::amx_bf16::"),
    "VNNI": ("dcx::avx512_bf16::", "dcx::amx_bf16::"),
    "AMX": ("dcx::amx_bf16::",),
}


def instructions_by_function(disassembly: str) -> dict[str, Counter[str]]:
    """Count, for each function, the instructions that need a set."""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in disassembly.splitlines():
        head = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if head:
            counts = found.setdefault(head[1], Counter())
            continue
        for need, pattern in NEEDS.items():
            if pattern.search(line):
                counts[need] += 1
    return found


def strays(found: dict[str, Counter[str]]) -> list[tuple[str, str]]:
    """Return (set, function) for functions that hold instructions of a set and belong to none of its units."""
    return [
        (need, name) for name, counts in found.items() for need in counts if not any(own in name for own in MAY[need])
    ]


def test_the_module_keeps_instructions_in_their_units() -> None:
    module = build.load_module()
    assert module is not None
    if not module.cpu_features()["avx512_bf16"]["compiled"]:
        pytest.skip("not an x86 build")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", module.__file__], capture_output=True, text=True, check=True
    )
    found = instructions_by_function(done.stdout)
    assert strays(found) == []
    for need, units in MAY.items():
        for unit in units:
            assert sum(counts[need] for name, counts in found.items() if unit in name) > 10, (need, unit)


def test_a_stray_instruction_is_seen() -> None:
    text = "0001 <dcx::avx2::f()>:\n 1:\tvaddps %zmm1,%zmm2,%zmm3\n"
    text += "0002 <dcx::avx512::g()>:\n 2:\tvdpbf16ps %zmm1,%zmm2,%zmm3\n 3:\tvpdpbusd %zmm1,%zmm2,%zmm3\n"
    text += "0003 <dcx::avx512_bf16::h()>:\n 4:\ttdpbf16ps %tmm5,%tmm4,%tmm0\n"
    assert strays(instructions_by_function(text)) == [
        ("AVX-512", "dcx::avx2::f()"),
        ("AVX512-BF16", "dcx::avx512::g()"),
        ("VNNI", "dcx::avx512::g()"),
        ("AMX", "dcx::avx512_bf16::h()"),
    ]
    assert strays(instructions_by_function("0003 <main>:\n 3:\tvaddps %ymm1,%ymm2,%ymm3\n")) == [("AVX", "main")]


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_a_packed_bfloat16_weight_serves_every_set(isa: str) -> None:
    x, w = gauss(2, 33, 50).bfloat16(), gauss(20, 33, 7, seed=1).bfloat16() / 15
    packed = packing.pack_conv1d(w)
    assert packed.dtype == torch.bfloat16 and packed.numel() == 7 * 34 * 32
    expected = torch.nn.functional.conv1d(x.double(), w.double())
    with suite.instruction_set(isa):
        y = ops.snake_conv1d(x, w, packed=packed)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("isa", suite.instruction_sets())
@pytest.mark.parametrize("stride, dilation, snake", [(1, 1, False), (2, 1, False), (1, 3, False), (3, 2, True)])
def test_one_channel_of_bfloat16(isa: str, stride: int, dilation: int, snake: bool) -> None:
    """Its taps lie in pairs; a NaN behind an odd last tap must not be met by the zero beside it."""
    x, w = gauss(2, 1, 300).bfloat16(), gauss(20, 1, 7, seed=1).bfloat16()
    alpha = torch.tensor([1.5]) if snake else None
    x[:, :, 150] = torch.nan
    with suite.instruction_set(isa):
        y = ops.snake_conv1d(x, w, alpha=alpha, stride=stride, dilation=dilation, padding=(3, 3))
    expected = dx.reference.snake_conv1d_ref(
        x.double(),
        w.double(),
        None,
        None if alpha is None else alpha.double(),
        stride,
        dilation,
        (3, 3),
        "none",
        None,
        None,
    )
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any()
    kept = ~expected.isnan()
    assert (y[kept].double() - expected[kept]).abs().max() <= 2**-7 * expected[kept].abs().max()


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 31, 48, 130])
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_odd_channels_of_bfloat16(isa: str, channels: int) -> None:
    x, w = gauss(1, channels, 40).bfloat16(), gauss(3, channels, 2, seed=1).bfloat16()
    expected = torch.nn.functional.conv1d(x.double(), w.double(), dilation=3)
    with suite.instruction_set(isa):
        y = ops.snake_conv1d(x, w, dilation=3)
        one = ops.snake_conv1d(x, w[:1], dilation=3)
    assert (y.double() - expected).abs().max() <= 2**-7 * expected.abs().max()
    assert (one.double() - expected[:, :1]).abs().max() <= 2**-7 * expected.abs().max()


def test_what_bfloat16_weights_take() -> None:
    """Half of float32's memory; float16 has no products of its own on a CPU and keeps float32 weights."""
    cpu = torch.device("cpu")
    assert steps.weight_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert steps.weight_dtype(torch.float16, cpu) == torch.float32
    config = dx.DualCodecConfig.preset("12hz_v1").to_dict()
    small = {"encoder_dim": 8, "decoder_dim": 96, "latent_dim": 64, "convnext_dim": 32, "semantic_codebook_size": 16}
    model = dx.reference.DualCodec(**{**config, **small, "codebook_size": 16})
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    wide, narrow, half = (Engine(model, dtype, form="direct").weight_bytes() for dtype in dtypes)
    assert narrow < 0.65 * wide and abs(half - wide) < 64  # the placeholder that carries a dtype


def test_packed_weights_of_the_wrong_kind_are_refused() -> None:
    x, w = gauss(1, 16, 9), gauss(16, 16, 3)
    packed = packing.pack_conv1d(w)
    with pytest.raises(ValueError, match=r"packed must be a contiguous BFloat16 tensor of 768 elements.*, got Float"):
        ops.snake_conv1d(x.bfloat16(), w.bfloat16(), packed=packed)
    with pytest.raises(ValueError, match=r"packed must be a contiguous Float tensor of 768 elements.*, got BFloat16"):
        ops.snake_conv1d(x, w, packed=packing.pack_conv1d(w.bfloat16()))


@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_a_bfloat16_decode_has_the_same_bits_in_any_batch_and_on_any_threads(isa: str) -> None:
    config = dx.DualCodecConfig.preset("12hz_v1").to_dict()
    small = {"encoder_dim": 8, "decoder_dim": 96, "latent_dim": 64, "convnext_dim": 32, "semantic_codebook_size": 16}
    torch.manual_seed(0)
    engine = Engine(dx.reference.DualCodec(**{**config, **small, "codebook_size": 16}), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(16, (8, 1, 9), generator=generator)
    acoustic = torch.randint(16, (8, 7, 9), generator=generator)
    frames = torch.tensor([9, 1, 4, 2, 9, 7, 0, 3])
    before = torch.get_num_threads()
    with suite.instruction_set(isa), torch.no_grad():
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(engine.decode(semantic, acoustic, engine.decode_lengths(frames)))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results[1:])
        for i, n in enumerate(frames.tolist()):
            alone = engine.decode(semantic[i : i + 1, :, :n], acoustic[i : i + 1, :, :n], None)
            assert torch.equal(results[0][i : i + 1, :, : alone.shape[-1]], alone)
