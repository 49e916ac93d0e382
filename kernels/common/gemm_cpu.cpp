#include "gemm.h"

namespace dcx {
namespace DCX_NS {
namespace {

template <class T, int MR, int NV>
inline void micro_kernel(const T* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t channels, const T* b,
                         int64_t b_stride, T* c, int64_t ld_c, bool add) {
  Vec<T> acc[MR][NV];  // every loop over it is unrolled, or it would live in memory
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec<T>{};
  for (int64_t k = 0; k < taps; ++k) {
    // Base rows three apart keep the addresses within base + {0, 1, 2} * row_stride, which x86 encodes without extra
    // registers.
    const T* rows[(MR + 2) / 3];
#pragma GCC unroll 8
    for (int g = 0; g < (MR + 2) / 3; ++g) rows[g] = a + k * tap_stride + 3 * g * row_stride;
    for (int64_t i = 0; i < channels; ++i) {
      Vec<T> bv[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) bv[n] = vload<T>(b + n * kLanes<T>);
      b += b_stride;
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Vec<T> av = vset1(rows[m / 3][(m % 3) * row_stride + i]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) acc[m][n] = vfma(av, bv[n], acc[m][n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      T* p = c + m * ld_c + n * kLanes<T>;
      vstore<T>(p, add ? vload<T>(p) + acc[m][n] : acc[m][n]);
    }
}

template <class T, int MR, int NV>
inline void row_block(int64_t rows, const T* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t channels,
                      const T* b, int64_t b_stride, T* c, int64_t ld_c, bool add) {
  if constexpr (MR > 1) {
    if (rows < MR) {
      row_block<T, MR - 1, NV>(rows, a, row_stride, tap_stride, taps, channels, b, b_stride, c, ld_c, add);
      return;
    }
  }
  micro_kernel<T, MR, NV>(a, row_stride, tap_stride, taps, channels, b, b_stride, c, ld_c, add);
}

// Rows per register block, so that MR * NV accumulators, NV columns and one broadcast fill the register file.
template <int NV>
constexpr int kBlockRows =
#if DCX_ISA == 2
    NV == 3   ? 9
    : NV == 2 ? 13
              : 16;
#else
    NV == 2 ? 6 : 12;
#endif

template <class T, int NV>
inline void panel_columns(int64_t m, const T* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t channels,
                          const T* b, int64_t b_stride, T* c, int64_t ld_c, bool add) {
  constexpr int MR = kBlockRows<NV>;
  for (int64_t i = 0; i < m; i += MR)
    row_block<T, MR, NV>(m - i < MR ? m - i : MR, a + i * row_stride, row_stride, tap_stride, taps, channels, b,
                         b_stride, c + i * ld_c, ld_c, add);
}

// One panel (width columns) over one reduction block.
template <class T>
void gemm_panel(int64_t m, const T* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t channels,
                const T* b, int64_t width, T* c, int64_t ld_c, bool add) {
  int64_t n = 0;
#if DCX_ISA == 2
  constexpr int64_t three = 3 * kLanes<T>;
  for (; n + three <= width; n += three)
    panel_columns<T, 3>(m, a, row_stride, tap_stride, taps, channels, b + n, width, c + n, ld_c, add);
#endif
  constexpr int64_t two = 2 * kLanes<T>;
  for (; n + two <= width; n += two)
    panel_columns<T, 2>(m, a, row_stride, tap_stride, taps, channels, b + n, width, c + n, ld_c, add);
  for (; n < width; n += kLanes<T>)
    panel_columns<T, 1>(m, a, row_stride, tap_stride, taps, channels, b + n, width, c + n, ld_c, add);
}

inline bool library_gemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
                         const float* a, const float* b, float* c) {
  const SmallGemm gemm = runtime().small_gemm;
  if (gemm == nullptr) return false;
  gemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c);
  return true;
}
inline bool library_gemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const double*, const double*,
                         double*) {
  return false;
}

// One block of the reduction: a run of taps, or some channels of one tap.
struct Block {
  int64_t tap, taps, c0, c1;
  bool add;
};

// Calls f with the blocks in order.
template <class T, class F>
inline void for_each_block(const GemmOperand<T>& op, const F& f) {
  const int64_t blocks_per_tap = ceil_div(op.channels, op.block);
  const int64_t taps_per_block = op.channels >= op.block ? 1 : op.block / op.channels;
  for (int64_t tap = 0; tap < op.taps; tap += taps_per_block) {
    const int64_t taps = op.taps - tap < taps_per_block ? op.taps - tap : taps_per_block;
    for (int64_t block = 0; block < blocks_per_tap; ++block)
      f(Block{tap, taps, op.channels * block / blocks_per_tap, op.channels * (block + 1) / blocks_per_tap,
              tap > 0 || block > 0});
  }
}

// One panel, of `width` columns, over one block.
template <class T>
inline void panel_block(int64_t m, const GemmOperand<T>& op, const Block& block, const T* panel, int64_t width, T* c,
                        int64_t ld_c) {
  const T* a = op.a + block.tap * op.tap_stride + block.c0;
  const T* slice = panel + (block.tap * op.channels + block.c0) * width;
  const int64_t channels = block.c1 - block.c0;
  for (int64_t k = 0; k < block.taps; ++k)
    if (!library_gemm(m, width, channels, op.row_stride, width, ld_c, block.add || k > 0, a + k * op.tap_stride,
                      slice + k * op.channels * width, c)) {
      gemm_panel<T>(m, a, op.row_stride, op.tap_stride, block.taps, channels, slice, width, c, ld_c, block.add);
      return;
    }
}

}  // namespace

template <class T>
void conv_gemm(int64_t m, const GemmOperand<T>& op, const T* b, int64_t columns, T* c, int64_t ld_c) {
  if (m <= 0) return;
  // Panels inside blocks: a block of the rows stays in L1 while the panels pass.
  for_each_block(op, [&](const Block& block) {
    for (int64_t p = 0; p < panel_count(columns); ++p) {
      const int64_t n0 = panel_begin(columns, p), width = panel_begin(columns, p + 1) - n0;
      panel_block<T>(m, op, block, b + op.taps * op.channels * n0, width, c + n0, ld_c);
    }
  });
}

template <class T>
void conv_gemm_panel(int64_t m, const GemmOperand<T>& op, const T* b, int64_t columns, int64_t panel, T* c,
                     int64_t ld_c, const GemmClips& clips) {
  if (m <= 0) return;
  const int64_t n0 = panel_begin(columns, panel), width = panel_begin(columns, panel + 1) - n0;
  for_each_block(op, [&](const Block& block) {
    for (int64_t i = 0; i < clips.count; ++i) {
      GemmOperand<T> clip = op;
      clip.a += i * clips.a_step;
      panel_block<T>(m, clip, block, b + op.taps * op.channels * n0, width, c + i * clips.c_step, ld_c);
    }
  });
}

template void conv_gemm<float>(int64_t, const GemmOperand<float>&, const float*, int64_t, float*, int64_t);
template void conv_gemm<double>(int64_t, const GemmOperand<double>&, const double*, int64_t, double*, int64_t);
template void conv_gemm_panel<float>(int64_t, const GemmOperand<float>&, const float*, int64_t, int64_t, float*,
                                     int64_t, const GemmClips&);
template void conv_gemm_panel<double>(int64_t, const GemmOperand<double>&, const double*, int64_t, int64_t, double*,
                                      int64_t, const GemmClips&);

}  // namespace DCX_NS
}  // namespace dcx
