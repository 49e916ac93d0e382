// What the ops on packed quantisers share: the shape checks and the packer.
#pragma once
#include <utility>

#include "../kernels/rvq_search/layout.h"
#include "checks.h"
#ifdef DCX_WITH_CUDA
#include "cuda.h"
#endif

namespace dcx {

constexpr int64_t kMaxCodeDim = 64;
constexpr int64_t kMaxEntries = 65536;

// codebooks [Q, N, D], out_weight [Q, C, D], out_bias [Q, C]; `like` gives the device.
inline RvqLayout check_quantizer(const char* op, const at::Tensor& codebooks, const at::Tensor& out_weight,
                                 const at::Tensor& out_bias, const at::Tensor& like) {
  DCX_CHECK(codebooks.dim() == 3, op, ": codebooks must be [Q, N, D], got ", shape_text(codebooks));
  DCX_CHECK(out_weight.dim() == 3, op, ": out_weight must be [Q, C, D], got ", shape_text(out_weight));
  const RvqLayout layout{codebooks.size(0), codebooks.size(1), codebooks.size(2), out_weight.size(1)};
  DCX_CHECK(layout.stages >= 1 && layout.entries >= 1 && layout.entries <= kMaxEntries && layout.dim >= 1 &&
                layout.dim <= kMaxCodeDim,
            op, ": codebooks must be [Q >= 1, N in 1..", kMaxEntries, ", D in 1..", kMaxCodeDim, "], got ",
            shape_text(codebooks));
  DCX_CHECK(layout.channels >= 1, op, ": out_weight must have at least one channel, got ", shape_text(out_weight));
  check_shape(op, "codebooks", codebooks, codebooks.sizes(), "[Q, N, D]", like);
  check_shape(op, "out_weight", out_weight, {layout.stages, layout.channels, layout.dim}, "[Q, C, D]", like);
  check_shape(op, "out_bias", out_bias, {layout.stages, layout.channels}, "[Q, C]", like);
  return layout;
}

// One layout for all devices: computed on the CPU, returned on the codebooks' device. in_weight [Q, D, C] and in_bias
// [Q, D] may be undefined: lookup needs no input projection.
at::Tensor pack_quantizer(const RvqLayout& layout, const at::Tensor& in_weight, const at::Tensor& in_bias,
                          const at::Tensor& codebooks, const at::Tensor& out_weight, const at::Tensor& out_bias,
                          at::ScalarType dtype);

// (codes searched for, those among them redone in float64), by the CPU's kernels since the last reset.
std::pair<int64_t, int64_t> rvq_search_counts(bool reset);
// For tests of the error bound: it is multiplied by this; 0 redoes nothing.
void set_rvq_search_bound_factor(double factor);
// As that, for the slack of the first pass; 0 keeps none but the best group.
void set_rvq_search_slack_factor(double factor);

#ifdef DCX_WITH_CUDA
// packed_or on like's device, aligned as the kernels need it: memory from torch's allocator is, a slice may not be.
template <class Pack>
inline at::Tensor cuda_packed_quantizer(const char* op, const OptionalTensor& packed, const RvqLayout& layout,
                                        const at::Tensor& like, const Pack& pack) {
  const at::Tensor values = packed_or(op, packed, layout.total(), accumulate_dtype(like.scalar_type()), pack);
  DCX_CHECK(values.device() == like.device(), op, ": packed must be on ", like.device(), " as the input is, got ",
            values.device());
  return reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0 ? values : values.clone();
}
#endif

}  // namespace dcx
