// conv_gemm: C[m, n] = sum over taps k and channels c of A[m * row_stride + k * tap_stride + c] * B[k, c, n].
// The one reduction under every convolution and projection: a dilated tap is a row offset, a stride a longer row.
// A register block of MR rows x NV vectors runs down the reduction in order, in blocks that depend on
// (taps, channels) alone, each block summed from zero and then added: an output's value depends neither on M nor on the
// tile.
#pragma once
#include "bf16.h"
#include "gemm_pack.h"
#include "runtime.h"

namespace dcx {
namespace DCX_NS {

// Reduction length after which a partial sum is added to C. Shorter chains round less: with 256 an upsampling's largest
// error was 2.2 times plain PyTorch's. 128 costs 1 to 4 % of the rate where weights stream from memory and nothing
// elsewhere.
constexpr int64_t kReductionBlock = 128;

// Rows that fill the register blocks of the widest panels with AVX-512, or AMX's registers: tiles of a multiple of them
// leave none to smaller blocks. AVX2's blocks of 6 rows and fewer are of nearly equal size whatever a tile has.
template <class A>
constexpr int64_t kRowUnit = DCX_ISA >= 4 && sizeof(A) == 2 ? 16 : 9;

// What sums of products of a tile's elements are kept in.
template <class A>
struct SumOf {
  typedef A type;
};
template <>
struct SumOf<Bf16> {
  typedef float type;
};
template <class A>
using Sum = typename SumOf<A>::type;

// Memory that is written after a product, and fetched while it is computed.
struct GemmFetch {
  char* at = nullptr;
  int64_t bytes = 0;

  GemmFetch part(int64_t i, int64_t parts) const {
    return {at + bytes * i / parts, bytes * (i + 1) / parts - bytes * i / parts};
  }
};

template <class A>
struct GemmOperand {
  const A* a;
  int64_t row_stride;
  int64_t tap_stride;
  int64_t taps;
  int64_t channels;
  int64_t block = kReductionBlock;  // how much of the reduction is summed before it is added to C
  GemmFetch later = {};
};

// c: [m][round_up(columns, 16)], rows ld_c apart, overwritten. b: panels of gemm_pack.h, or of gemm_pack_bf16.h whose
// elements are two channels' weights. A tile then has an even number of channels, zero where there is none, and the
// reduction is cut between pairs. (A, B): (float, float), (double, double) and (Bf16Kind::Tile, Bf16Pair).
template <class A, class B>
void conv_gemm(int64_t m, const GemmOperand<A>& op, const B* b, int64_t columns, Sum<A>* c, int64_t ld_c);

// Clips of m rows each that share one pass over the weights: clip i reads a + i * a_step and writes c + i * c_step.
struct GemmClips {
  int64_t count = 1;
  int64_t a_step = 0;
  int64_t c_step = 0;
};

// As conv_gemm, bit for bit, for one panel's columns alone; c points at the first of them. The weights are read in the
// order in which they lie, once for all clips, and those behind a block are fetched while it is multiplied: what a few
// rows of a wide layer are bound by.
template <class A, class B>
void conv_gemm_panel(int64_t m, const GemmOperand<A>& op, const B* b, int64_t columns, int64_t panel, Sum<A>* c,
                     int64_t ld_c, const GemmClips& clips = {});

// One panel's product among several whose weights, of `width` columns each, lie one behind the other; `fetched`: as
// conv_gemm_panel does it, for weights from beyond the second-level cache. Bits are the same.
template <class A, class B>
inline void conv_gemm_among(bool fetched, int64_t m, const GemmOperand<A>& op, const B* b, int64_t width, Sum<A>* c) {
  if (fetched)
    conv_gemm_panel<A>(m, op, b, width, 0, c, width);
  else
    conv_gemm<A>(m, op, b, width, c, width);
}

}  // namespace DCX_NS
}  // namespace dcx
