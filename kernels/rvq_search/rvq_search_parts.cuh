// What the kernels of rvq_search share: how a frame's query is made, the sum behind the last stage, the launch.
#pragma once
#include <math.h>

#include "../common/launch.cuh"
#include "params.h"
#include "rvq_device.cuh"
#include "rvq_project_in.cuh"

namespace dcx {

struct RvqSearchLaunch {
  RvqSearchParams p;
  int slots;  // groups of four columns that the input projection takes at once; a property of the layer
  int depth;  // passes of a codebook in shared memory: 1, 2 or 4
};

DCX_DEVICE const float* packed_of(const RvqSearchParams& p) { return static_cast<const float*>(p.packed); }

// query = -2 e / |e|, for an e whose coordinates lie kFrames apart; false where e is not finite, the query then 0. A
// square may overflow where e itself is finite: then e is scaled by its largest coordinate first. kDim 0: dim.
template <int kDim, int kFrames>
DCX_DEVICE bool make_query(float* query, const float* e, int dim) {
  if constexpr (kDim > 0) dim = kDim;
  float square = 0.0f;
  for (int d = 0; d < dim; ++d) square = fused_multiply_add(e[d * kFrames], e[d * kFrames], square);
  const float norm = sqrtf(square);
  if (norm < infinity()) {
    const float scale = -2.0f / maximum(norm, 1e-12f);
    for (int d = 0; d < dim; ++d) query[d] = e[d * kFrames] * scale;
    return true;
  }
  float largest = 0.0f;
  bool finite = true;
  for (int d = 0; d < dim; ++d) {
    const float size = fabsf(e[d * kFrames]);
    finite = finite && size < infinity();
    largest = fmaxf(largest, size);
  }
  float scaled = 0.0f;
  for (int d = 0; d < dim; ++d) {
    query[d] = finite ? e[d * kFrames] / largest : 0.0f;
    scaled = fused_multiply_add(query[d], query[d], scaled);
  }
  for (int d = 0; d < dim; ++d) query[d] = finite ? -2.0f * query[d] / sqrtf(scaled) : 0.0f;
  return finite;
}

// The quantised sum, where it is wanted, from the chosen rows [used D][kFrames]. staged: kThreads columns.
template <int kDim, int kFrames, int kThreads>
DCX_DEVICE void write_sum(const RvqSearchParams& p, const FrameTile<kFrames>& tile, const float* rows, float* staged) {
  if (p.quantized.data == nullptr) return;
  DCX_NO_UNROLL
  for (int64_t first = 0; first < p.layout.channels; first += kThreads) {
    const int count = static_cast<int>(minimum(int64_t{kThreads}, p.layout.channels - first));
    if (thread_index() < count) {
      float sums[kFrames];
      project_out<kDim>(sums, packed_of(p), p.layout, p.used, rows, first + thread_index());
      store_frames(staged + thread_index() * kFramePitch<kFrames>, sums);
    }
    sync_threads();
    store_columns<kFrames, kThreads>(p.quantized, TensorView{}, tile, staged, first, count);
    sync_threads();
  }
}

template <class K>
int slots_of(const RvqSearchParams& p) {
  const int64_t groups = ceil_div(p.layout.stages * p.layout.dim, 4);
  int slots = 1;
  while (slots < groups && slots < K::ProjectIn::kMostSlots) slots *= 2;
  return slots;
}

}  // namespace dcx
