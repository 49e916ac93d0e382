"""faiss-cpu for the RVQ search: one flat index per stage over the normalised rows, projections on torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.program import Quantizer

from .base import Call, need
from .folded import FoldedQuantizer, State, finish, leave


def search_call(quantizer: Quantizer, state: State, z: Tensor) -> Call:
    """z [1, C, F] float32 -> codes [1, Q, F], as FoldedQuantizer.search with faiss for the nearest rows."""
    need("faiss")
    import faiss

    module = finish(FoldedQuantizer(quantizer, state), "1d", torch.float32)
    assert isinstance(module, FoldedQuantizer)
    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = []
    for i in range(module.stages):
        rows = F.normalize(module.get_parameter(f"book{i}").detach())
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add(rows.numpy())
        indexes.append(index)

    @torch.inference_mode()
    def call() -> object:
        residual, codes = leave(z)[0], []  # [F, C]
        for i, index in enumerate(indexes):
            e = F.normalize(
                F.linear(residual, module.get_parameter(f"in_weight{i}"), module.get_parameter(f"in_bias{i}"))
            )
            _, nearest = index.search(e.numpy(), 1)
            codes.append(torch.from_numpy(nearest[:, 0]))
            rows = F.embedding(codes[-1], module.get_parameter(f"book{i}"))
            residual = residual - F.linear(
                rows, module.get_parameter(f"out_weight{i}"), module.get_parameter(f"out_bias{i}")
            )
        return torch.stack(codes)[None]

    return call
