// Moves a stretch of time steps between strided tensors of any element type and a scratch tile [rows][ld] of the
// compute type (channels innermost, columns past the channels zero). Steps outside [0, valid) read as zero.
#pragma once
#include "bf16.h"
#include "runtime.h"
#include "transpose.h"

namespace dcx {
namespace DCX_NS {

#if DCX_ISA >= 1
static inline float f16_to_float(uint16_t bits) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }
static inline uint16_t float_to_f16(float value) {
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
}
#else
static inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  float value;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24 is exact
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  memcpy(&value, &wide, 4);
  return value;
}
static inline uint16_t float_to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    float positive;
    memcpy(&positive, &magnitude, 4);
    positive += 0.5f;
    uint32_t shifted;
    memcpy(&shifted, &positive, 4);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return static_cast<uint16_t>(sign | (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
}
#endif

struct LoadF32 {
  typedef float Element;
  static inline float get(const float* p) { return *p; }
  static inline void put(float* p, double v) { *p = static_cast<float>(v); }
};
struct LoadF64 {
  typedef double Element;
  static inline double get(const double* p) { return *p; }
  static inline void put(double* p, double v) { *p = v; }
};
struct LoadBF16 {
  typedef uint16_t Element;
  static inline float get(const uint16_t* p) { return bf16_to_float(*p); }
  static inline void put(uint16_t* p, float v) { *p = float_to_bf16(v); }
};
struct LoadF16 {
  typedef uint16_t Element;
  static inline float get(const uint16_t* p) { return f16_to_float(*p); }
  static inline void put(uint16_t* p, float v) { *p = float_to_f16(v); }
};

template <class Io>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<LoadBF16> = true;
template <class Io>
constexpr bool kIsF32 = false;
template <>
constexpr bool kIsF32<LoadF32> = true;

// One element into a tile.
template <class Io, class T>
static inline void tile_put(T* out, const typename Io::Element* p) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (kIsBf16<Io>)
      out->bits = *p;
    else
      out->bits = float_to_bf16(static_cast<float>(Io::get(p)));
  } else {
    *out = static_cast<T>(Io::get(p));
  }
}

// A row of contiguous channels, with vector code for bfloat16.
template <class Io, class T>
static inline void load_row(T* out, const typename Io::Element* row, int64_t channels) {
  int64_t c = 0;
  if constexpr (kIsBf16<Io> && sizeof(T) == 2) {
    memcpy(out, row, static_cast<size_t>(channels) * sizeof(T));
    return;
  } else if constexpr (kIsBf16<Io> && sizeof(T) == 4) {
    for (; c + kLanes<float> <= channels; c += kLanes<float>) vstore<float>(out + c, vload_bf16(row + c));
  }
  for (; c < channels; ++c) tile_put<Io>(out + c, row + c);
}
template <class Io, class T>
static inline void store_row(typename Io::Element* row, const T* in, int64_t channels) {
  int64_t c = 0;
  if constexpr (kIsBf16<Io> && sizeof(T) == 4)
    for (; c + kLanes<float> <= channels; c += kLanes<float>) vstore_bf16(row + c, vload<float>(in + c));
  for (; c < channels; ++c) Io::put(row + c, in[c]);
}

template <class Io, class T>
static void load_rows(T* tile, int64_t ld, int64_t rows, int64_t channels, const typename Io::Element* base,
                      int64_t stride_c, int64_t stride_t) {
  if (stride_c == 1) {
    for (int64_t r = 0; r < rows; ++r) load_row<Io>(tile + r * ld, base + r * stride_t, channels);
    return;
  }
#if DCX_ISA >= 1
  if constexpr (kIsF32<Io> && sizeof(T) == sizeof(float))
    if (stride_t == 1) return transpose(tile, ld, base, stride_c, channels, rows);
#endif
  // Blocks of 16 channels x 16 steps keep both sides within a few cache lines.
  for (int64_t c0 = 0; c0 < channels; c0 += 16)
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
      for (int64_t c = c0; c < channels && c < c0 + 16; ++c)
        for (int64_t r = r0; r < rows && r < r0 + 16; ++r)
          tile_put<Io>(tile + r * ld + c, base + c * stride_c + r * stride_t);
}

template <class Io, class T>
static void store_rows(const T* tile, int64_t ld, int64_t rows, int64_t channels, typename Io::Element* base,
                       int64_t stride_c, int64_t stride_t) {
  if (stride_c == 1) {
    for (int64_t r = 0; r < rows; ++r) store_row<Io>(base + r * stride_t, tile + r * ld, channels);
    return;
  }
#if DCX_ISA >= 1
  if constexpr (kIsF32<Io> && sizeof(T) == sizeof(float))
    if (stride_t == 1) return transpose(base, stride_c, tile, ld, rows, channels);
#endif
  for (int64_t c0 = 0; c0 < channels; c0 += 16)
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
      for (int64_t c = c0; c < channels && c < c0 + 16; ++c)
        for (int64_t r = r0; r < rows && r < r0 + 16; ++r)
          Io::put(base + c * stride_c + r * stride_t, tile[r * ld + c]);
}

// This thread's memory at one of its places, as rows of T.
template <class T>
static inline T* scratch_rows(int slot, int64_t rows, int64_t width) {
  return static_cast<T*>(thread_scratch(slot, static_cast<size_t>(rows * width) * sizeof(T)));
}

// Tile rows [first, last) hold time steps in [0, valid) when row 0 holds step `begin`.
struct RowRange {
  int64_t first, last;
};
static inline RowRange rows_inside(int64_t begin, int64_t rows, int64_t valid) {
  int64_t first = begin < 0 ? -begin : 0;
  if (first > rows) first = rows;
  int64_t last = valid - begin < rows ? valid - begin : rows;
  if (last < first) last = first;
  return {first, last};
}

// Tile row r takes time step begin + r of batch item b; ld >= round_up(channels, 16), columns up to ld become zero.
template <class T>
static void load_tile(T* tile, int64_t ld, int64_t rows, int64_t channels, const TensorView& x, int64_t b,
                      int64_t begin, int64_t valid) {
  const auto [first, last] = rows_inside(begin, rows, valid);
  memset(tile, 0, static_cast<size_t>(first * ld) * sizeof(T));
  memset(tile + last * ld, 0, static_cast<size_t>((rows - last) * ld) * sizeof(T));
  if (ld > channels)
    for (int64_t r = first; r < last; ++r)
      memset(tile + r * ld + channels, 0, static_cast<size_t>(ld - channels) * sizeof(T));
  const int64_t offset = b * x.stride_b + (begin + first) * x.stride_t;
  T* out = tile + first * ld;
  const int64_t count = last - first;
  if (count == 0) return;
  switch (x.dtype) {
    case DType::kF32:
      load_rows<LoadF32>(out, ld, count, channels, static_cast<const float*>(x.data) + offset, x.stride_c, x.stride_t);
      break;
    case DType::kF64:
      load_rows<LoadF64>(out, ld, count, channels, static_cast<const double*>(x.data) + offset, x.stride_c, x.stride_t);
      break;
    case DType::kBF16:
      load_rows<LoadBF16>(out, ld, count, channels, static_cast<const uint16_t*>(x.data) + offset, x.stride_c,
                          x.stride_t);
      break;
    case DType::kF16:
      load_rows<LoadF16>(out, ld, count, channels, static_cast<const uint16_t*>(x.data) + offset, x.stride_c,
                         x.stride_t);
      break;
  }
}

template <class T>
constexpr DType kDTypeOf = sizeof(T) == 8   ? DType::kF64
                           : sizeof(T) == 4 ? DType::kF32
                                            : DType::kBF16;

// Whether x's rows are what a tile's rows would be: they can then be read and written where they are.
template <class T>
static inline bool is_direct(const TensorView& x, int64_t channels) {
  return x.dtype == kDTypeOf<T> && x.stride_c == 1 && channels % kColumnUnit == 0;
}
template <class T>
static inline T* row_of(const TensorView& x, int64_t b, int64_t t) {
  return static_cast<T*>(x.data) + b * x.stride_b + t * x.stride_t;
}

// Writes tile rows to time steps begin .. begin + rows of batch item b; steps at or past valid are written as zero.
template <class T>
static void store_tile(T* tile, int64_t ld, int64_t rows, int64_t channels, const TensorView& y, int64_t b,
                       int64_t begin, int64_t valid) {
  int64_t kept = valid - begin < 0 ? 0 : valid - begin;
  if (kept < rows) memset(tile + kept * ld, 0, static_cast<size_t>((rows - kept) * ld) * sizeof(T));
  const int64_t offset = b * y.stride_b + begin * y.stride_t;
  switch (y.dtype) {
    case DType::kF32:
      store_rows<LoadF32>(tile, ld, rows, channels, static_cast<float*>(y.data) + offset, y.stride_c, y.stride_t);
      break;
    case DType::kF64:
      store_rows<LoadF64>(tile, ld, rows, channels, static_cast<double*>(y.data) + offset, y.stride_c, y.stride_t);
      break;
    case DType::kBF16:
      store_rows<LoadBF16>(tile, ld, rows, channels, static_cast<uint16_t*>(y.data) + offset, y.stride_c, y.stride_t);
      break;
    case DType::kF16:
      store_rows<LoadF16>(tile, ld, rows, channels, static_cast<uint16_t*>(y.data) + offset, y.stride_c, y.stride_t);
      break;
  }
}

}  // namespace DCX_NS
}  // namespace dcx
