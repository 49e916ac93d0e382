// Cases' tensors as the kernels take them.
#pragma once
#include "../../kernels/common/conv_gemm_params.h"
#include "case.h"

// A [B, T, C] tensor, channels-last; [B, C, T] in memory where the case says "channels_first".
inline dcx::TensorView view_of(const Array& a, const Case& c) {
  dcx::TensorView view;
  view.data = a.data;
  view.dtype = a.kernel_dtype();
  view.stride_b = a.shape[1] * a.shape[2];
  const bool first = c.number("channels_first", 0) != 0;
  view.stride_t = first ? 1 : a.shape[2];
  view.stride_c = first ? a.shape[1] : 1;
  return view;
}

// The data, moved past a 16-byte boundary by as many elements as the case says in "shift".
inline void* shifted(const Array& a, Case& c) {
  const size_t shift = static_cast<size_t>(c.number("shift", 0) * a.element_bytes());
  if (shift == 0) return a.data;
  char* moved = static_cast<char*>(c.scratch(a.bytes() + shift)) + shift;
  if (a.bytes() > 0) memcpy(moved, a.data, a.bytes());
  return moved;
}

// A GPU of the case's choice; by default one so small that large tiles are chosen for short signals too.
inline dcx::CudaContext context_of(const Case& c) {
  dcx::CudaContext context;
  context.multiprocessors = static_cast<int>(c.number("multiprocessors", 1));
  context.allow_tf32 = c.number("allow_tf32", 0) != 0;
  context.capability = static_cast<int>(c.number("capability", 90));
  context.wgmma = context.capability == 90 && c.number("wgmma", 1) != 0;
  context.shared_bytes = static_cast<int>(c.number("shared_bytes", context.shared_bytes));
  return context;
}

inline void start(Case& c, dcx::ConvGemmPlan plan) {
  if (plan.partial_floats > 0) {
    plan.params.partial = static_cast<float*>(c.scratch(static_cast<size_t>(plan.partial_floats) * 4));
    plan.params.counters = static_cast<uint32_t*>(c.scratch(static_cast<size_t>(plan.tiles) * 4));
    memset(plan.params.counters, 0, static_cast<size_t>(plan.tiles) * 4);
  }
  if (plan.prepared_bytes > 0) {
    plan.prepared.to = c.scratch(static_cast<size_t>(plan.prepared_bytes));
    plan.params.x.data = plan.prepared.to;
  }
  plan.start(context_of(c), plan);
  for (int64_t i = 0; i < (plan.partial_floats > 0 ? plan.tiles : 0); ++i)
    if (plan.params.counters[i] != 0) throw std::runtime_error("a kernel must leave its counters at zero");
}
