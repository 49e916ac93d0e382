// bfloat16 in tiles, in packed weights and in registers: the upper half of a float.
#pragma once
#include "dtype.h"
#include "vec.h"

namespace dcx {
namespace DCX_NS {

struct Bf16 {
  uint16_t bits;
};

static inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
static inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bf16_bits(bits);
}

// Channels in one element of packed weights.
template <class Weight>
constexpr int64_t kChannelsPerElement = 1;
template <>
constexpr int64_t kChannelsPerElement<Bf16Pair> = 2;

// What kernels for a dtype work in: a tile's elements, packed weights, sums.
struct SingleKind {
  typedef float Tile;
  typedef float Weight;
  typedef float Sum;
};
struct DoubleKind {
  typedef double Tile;
  typedef double Weight;
  typedef double Sum;
};
// Where no instruction multiplies pairs, tiles hold floats: widening them at every use would cost more than the memory.
struct Bf16Kind {
#if DCX_ISA >= 3
  typedef Bf16 Tile;
#else
  typedef float Tile;
#endif
  typedef Bf16Pair Weight;
  typedef float Sum;
};

// Elements of Kind's packed weights that a reduction over so many channels takes.
template <class Kind>
static inline int64_t weight_steps(int64_t channels) {
  return ceil_div(channels, static_cast<int64_t>(kChannelsPerElement<typename Kind::Weight>));
}

typedef uint32_t UVec __attribute__((vector_size(DCX_VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(DCX_VECTOR_BYTES / 2)));

static inline Vec<float> vload_bf16(const uint16_t* p) {
  HalfVec half;
  memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, UVec) << 16);
}

// bf16_bits of every lane.
static inline void vstore_bf16(uint16_t* p, Vec<float> v) {
  const UVec bits = reinterpret_cast<UVec>(v);
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const HalfVec half = __builtin_convertvector(v != v ? UVec{} + 0x7fc0u : rounded, HalfVec);
  memcpy(p, &half, sizeof(half));
}

// A register of pairs, the first of each in a lane's lower half.
typedef UVec PairVec;
static inline PairVec load_pairs(const Bf16Pair* p) {
  PairVec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
static inline Vec<float> pair_half(PairVec v, int half) {
  return reinterpret_cast<Vec<float>>(half == 0 ? v << 16 : v & 0xffff0000u);
}
#if DCX_ISA >= 3
static inline PairVec broadcast_pair(const Bf16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof(pair));
  return reinterpret_cast<PairVec>(_mm512_set1_epi32(pair));
}
// sum + a[0] * b[0] + a[1] * b[1] per lane; the products are summed as the instruction does it.
static inline Vec<float> dot_pairs(PairVec a, PairVec b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// Tile elements of any type as floats or doubles.
template <class T>
static inline Vec<T> vload_tile(const T* p) {
  return vload<T>(p);
}
static inline Vec<float> vload_tile(const Bf16* p) { return vload_bf16(&p->bits); }
template <class T>
static inline void vstore_tile(T* p, Vec<T> v) {
  vstore<T>(p, v);
}
// To memory, where bfloat16 keeps denormals.
template <class T>
static inline void vstore_out(T* p, Vec<T> v) {
  vstore<T>(p, v);
}
static inline void vstore_out(Bf16* p, Vec<float> v) { vstore_bf16(&p->bits, v); }
// VCVTNEPS2BF16 turns denormals to zero, as VDPBF16PS does with those that it reads from a tile.
static inline void vstore_tile(Bf16* p, Vec<float> v) {
#if DCX_ISA >= 3
  const __m256bh half = _mm512_cvtneps_pbh(v);
  memcpy(p, &half, sizeof(half));
#else
  vstore_bf16(&p->bits, v);
#endif
}

}  // namespace DCX_NS
}  // namespace dcx
