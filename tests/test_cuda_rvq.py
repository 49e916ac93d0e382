"""rvq_search and rvq_lookup on a GPU: codes, margins and sums, and what their own test files try beyond one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gpu
import opsuite as suite
import pytest
import test_rvq_lookup as lookup
import test_rvq_search as search
import torch
from gpu import DEVICE, by_dtype, families, gpu_alone

import dualcodec_ext as dx
from dualcodec_ext import ops, testing
from dualcodec_ext.ops import packing

pytestmark = gpu.needs_device
SHAPES = search.SHAPES | search.CODEC
by_family = pytest.mark.parametrize("family", families("rvq_search"))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with gpu.exact_float32():
        yield


@pytest.mark.parametrize(
    "shape", [*search.SHAPES.values(), *search.CODEC.values()], ids=[*search.SHAPES, *search.CODEC]
)
@by_family
def test_rvq_search(family: str, shape: dict[str, Any]) -> None:
    with dx.backend(family):
        for frames in (shape.get("frames", 30), 1, 130):
            report = search.check(search.make(**{**shape, "frames": frames}).to(DEVICE))
            assert report.excused <= max(1, report.total // 100)


@by_dtype
@by_family
def test_rvq_search_dtypes(family: str, dtype: torch.dtype) -> None:
    q = search.make(channels=40, frames=200).to(DEVICE)
    q = search.Quantizer(q.z.to(dtype), q.weights)
    with dx.backend(family):
        packed = packing.pack_rvq(**q.weights)
        found = q.search(return_quantized=True, return_margin=True)
        again = q.search(return_quantized=True, return_margin=True, packed=packed)
        torch.backends.cuda.matmul.allow_tf32 = True
        with_flag = q.search(return_quantized=True, return_margin=True)
        torch.backends.cuda.matmul.allow_tf32 = False
    for other in (again, with_flag):
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    expected, _, margins = q.reference(return_margin=True)
    testing.compare_codes(found[0], expected, margins, testing.rvq_margin_bound(q.z, **q.weights))
    assert found[1].dtype == dtype and found[2].dtype == torch.float32


@by_family
def test_rvq_search_batches_and_cuts_have_the_same_bits(family: str) -> None:
    q = search.make(channels=128, frames=333, entries=500, batch=3).to(DEVICE)
    with dx.backend(family):
        whole = q.search(return_quantized=True, return_margin=True)
        for i in range(3):
            alone = q.search(q.z[i : i + 1], return_quantized=True, return_margin=True)
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))
        parts = [q.search(part, return_quantized=True)[1] for part in q.z.split([1, 2, 8, 61, 261], dim=-1)]
    assert torch.equal(torch.cat(parts, -1), whole[1])


# On an H100: few more than two frames to a multiprocessor, nearly a tile of 16 to each, two tiles to each.
@pytest.mark.parametrize("frames", [290, 2000, 4500])
@pytest.mark.parametrize("shape", search.CODEC.values(), ids=search.CODEC.keys())
@by_family
def test_rvq_search_of_many_frames(family: str, shape: dict[str, Any], frames: int) -> None:
    q = search.make(**{**shape, "frames": frames}).to(DEVICE)
    with dx.backend(family):
        packed = packing.pack_rvq(**q.weights)
        report = search.check(q)
        assert report.excused <= max(1, report.total // 100)
        # Without margins another kernel may search.
        codes, total, margins = q.search(packed=packed, return_quantized=True, return_margin=True)
        plain, plain_total, _ = q.search(packed=packed, return_quantized=True)
        assert margins is not None and torch.equal(plain, codes) and torch.equal(plain_total, total)
        if family == "cuda":
            few = torch.cat([q.search(z, packed=packed)[0] for z in q.z[..., :290].split(58, dim=-1)], -1)
            assert torch.equal(few, codes[..., :290])


@gpu_alone
@by_family
def test_rvq_search_stores_no_distance_matrix(family: str) -> None:
    q = search.make(channels=768, frames=4000, stages=1, entries=16384, batch=1).to(DEVICE)
    with dx.backend(family):
        packed = packing.pack_rvq(**q.weights)
        q.search(packed=packed)
        used = gpu.peak_bytes(lambda: q.search(packed=packed))
    assert used < 8 * 2**20, f"{used} bytes; the matrix would be {4000 * 16384 * 4}"


ON_THE_CPU_TOO = [
    *(search.test_every_prefix_of_stages, search.test_only_what_is_asked_for_comes, search.test_gradient_is_refused),
    *(search.test_strides_and_slices, search.test_edge_sizes, search.test_ties_take_the_lowest_index),
    *(search.test_a_zero_vector_takes_the_smallest_square, search.test_scale_does_not_matter, search.test_lengths),
    search.test_nan_gives_code_0_and_a_nan_sum,
    *(lookup.test_strides_and_slices, lookup.test_edge_sizes, lookup.test_a_code_out_of_range_is_named),
]


@pytest.mark.parametrize("body", ON_THE_CPU_TOO, ids=lambda f: f"{f.__module__}.{f.__name__}")
@by_family
def test_as_on_the_cpu(family: str, body: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = search if body.__module__ == search.__name__ else lookup
    make = module.make
    monkeypatch.setattr(
        module,
        "make",
        lambda *a, **k: m.to(DEVICE) if isinstance(m := make(*a, **k), search.Quantizer) else suite.moved(m, DEVICE),
    )
    names = list(inspect.signature(body).parameters)
    values = {"frames": suite.EDGE_STEPS, "value": [50, -1, 2**40]}.get(names[0], []) if names else []
    with dx.backend(family):
        for value in values or [None]:
            body(**({names[0]: value} if names else {}))


@by_family
def test_rvq_search_opcheck(family: str) -> None:
    q = search.make().to(DEVICE)
    lengths = torch.tensor([30, 4], device=DEVICE)
    with dx.backend(family):
        packed = packing.pack_rvq(**q.weights)
    for more in ((3, True, True, lengths, None), (2, False, False, None, packed)):
        suite.check_opcheck("rvq_search", q.z, *q.weights.values(), *more, namespace=gpu.namespace(family))


@by_family
def test_codes_behind_an_items_end_are_not_looked_at(family: str) -> None:
    codes, weights, addend = suite.moved(lookup.make(batch=2), DEVICE)
    lengths = torch.tensor([30, 4])
    wrong = codes.clone()
    wrong[1, :, 4:] = 10**9
    with dx.backend(family):
        found = ops.rvq_lookup(wrong, **weights, addend=addend, lengths=lengths)
        assert torch.equal(found, ops.rvq_lookup(codes, **weights, addend=addend, lengths=lengths))
