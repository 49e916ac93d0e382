// Element types that tensors may have in memory; kernels compute in float (for f32, bf16, f16) or double (for f64).
#pragma once
#include <stdint.h>

// On functions of layout and length that kernels of both kinds call.
#ifdef __CUDACC__
#define DCX_HOST_DEVICE __host__ __device__
#else
#define DCX_HOST_DEVICE
#endif

namespace dcx {

enum class DType : int32_t { kF32 = 0, kF64 = 1, kBF16 = 2, kF16 = 3 };

// A strided [B, C, T] tensor; strides in elements.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride_b = 0;
  int64_t stride_c = 0;
  int64_t stride_t = 0;
};

DCX_HOST_DEVICE inline int64_t element_size(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}

// The view without its first channels and steps.
DCX_HOST_DEVICE inline TensorView view_from(TensorView view, int64_t channel, int64_t step = 0) {
  view.data =
      static_cast<char*>(view.data) + (channel * view.stride_c + step * view.stride_t) * element_size(view.dtype);
  return view;
}

// Two neighbouring channels' weights as bfloat16, the first in the lower half: what VDPBF16PS multiplies at once.
struct Bf16Pair {
  uint32_t bits;
};

// A float's bits rounded to bfloat16: nearest, ties to even.
DCX_HOST_DEVICE inline uint16_t bf16_bits(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Channel counts are padded to this many columns in packed weights and scratch tiles: one AVX-512 register of floats,
// so that no kernel needs a masked column.
constexpr int64_t kColumnUnit = 16;

DCX_HOST_DEVICE inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
DCX_HOST_DEVICE inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

template <class T>
DCX_HOST_DEVICE inline T minimum(T a, T b) {
  return b < a ? b : a;
}
template <class T>
DCX_HOST_DEVICE inline T maximum(T a, T b) {
  return a < b ? b : a;
}

}  // namespace dcx
