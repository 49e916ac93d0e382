#include "gemm.h"
#if DCX_ISA >= 4
#include "gemm_amx.h"
#endif

namespace dcx {
namespace DCX_NS {
namespace {

// Weights beyond this pass through L2 once per tile.
constexpr int64_t kStreamedBytes = 256 * 1024;

// Weights that come next, fetched into L2 between the products, `lines` lines of 64 bytes every so many steps: where a
// few rows keep the multipliers busy for as long as memory takes.
struct Stream {
  const char* at = nullptr;
  int64_t bytes = 0;
  int64_t lines = 0;
  int64_t every = 0;  // 0: none are fetched

  // Spreads the lines over the steps that are left, all blocks of rows and columns counted. At least so many steps lie
  // between two fetches: looking after every step costs a third of the rate where weights are in L2.
  static constexpr int64_t kLeastSteps = 4;
  inline void spread(int64_t left, int64_t steps) {
    const int64_t wanted = ceil_div(bytes, 64);
    every = wanted > 0 ? minimum(left < kLeastSteps * wanted ? kLeastSteps : left / wanted, steps) : 0;
    lines = wanted > 0 ? ceil_div(wanted * every, left) : 0;
  }
  inline void fetch() {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + 64 * line, 0, 2);
    at += 64 * lines;
  }
  // What `taps` times `steps` steps have fetched is behind.
  inline Stream after(int64_t taps, int64_t steps) const {
    const int64_t fetched = every > 0 ? minimum(bytes, 64 * lines * taps * ceil_div(steps, every)) : 0;
    return {at + fetched, bytes - fetched};
  }
};

// With fewer rows the loop is bound by reading its own weights, in order, which the hardware fetches ahead.
constexpr int kFetchingRows = 4;

// Everything below counts the reduction in steps, one element of B each.
template <class A, class B, int MR, int NV>
inline void micro_kernel(const A* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t steps, const B* b,
                         int64_t b_stride, Sum<A>* c, int64_t ld_c, bool add, Stream stream) {
  typedef Sum<A> T;
  constexpr int64_t kStep = kChannelsPerElement<B>;
  Vec<T> acc[MR][NV];  // every loop over it is unrolled, or it would live in memory
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 6
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec<T>{};
  for (int64_t k = 0; k < taps; ++k) {
    // Base rows three apart keep the addresses within base + {0, 1, 2} * row_stride, which x86 encodes without extra
    // registers.
    const A* rows[(MR + 2) / 3];
#pragma GCC unroll 8
    for (int g = 0; g < (MR + 2) / 3; ++g) rows[g] = a + k * tap_stride + 3 * g * row_stride;
    for (int64_t i = 0, stop = 0; i < steps;) {
      stop = steps;
      if constexpr (MR >= kFetchingRows)
        if (stream.every > 0) {
          stream.fetch();
          stop = minimum(i + stream.every, steps);
        }
      for (; i < stop; ++i) {
        if constexpr (kStep == 1) {
          Vec<T> bv[NV];
#pragma GCC unroll 6
          for (int n = 0; n < NV; ++n) bv[n] = vload<T>(b + n * kLanes<T>);
#pragma GCC unroll 16
          for (int m = 0; m < MR; ++m) {
            const Vec<T> av = vset1(rows[m / 3][(m % 3) * row_stride + i]);
#pragma GCC unroll 6
            for (int n = 0; n < NV; ++n) acc[m][n] = vfma(av, bv[n], acc[m][n]);
          }
        } else if constexpr (sizeof(A) == 2) {
          PairVec bv[NV];
#pragma GCC unroll 6
          for (int n = 0; n < NV; ++n) bv[n] = load_pairs(b + n * kLanes<T>);
#pragma GCC unroll 16
          for (int m = 0; m < MR; ++m) {
            const PairVec av = broadcast_pair(rows[m / 3] + (m % 3) * row_stride + kStep * i);
#pragma GCC unroll 6
            for (int n = 0; n < NV; ++n) acc[m][n] = dot_pairs(av, bv[n], acc[m][n]);
          }
        } else {
          // The pair's halves as floats, one after the other: both at once would not leave registers for the sums.
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            Vec<T> bv[NV];
#pragma GCC unroll 6
            for (int n = 0; n < NV; ++n) bv[n] = pair_half(load_pairs(b + n * kLanes<T>), half);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
              const Vec<T> av = vset1(rows[m / 3][(m % 3) * row_stride + kStep * i + half]);
#pragma GCC unroll 6
              for (int n = 0; n < NV; ++n) acc[m][n] = vfma(av, bv[n], acc[m][n]);
            }
          }
        }
        b += b_stride;
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 6
    for (int n = 0; n < NV; ++n) {
      T* p = c + m * ld_c + n * kLanes<T>;
      vstore<T>(p, add ? vload<T>(p) + acc[m][n] : acc[m][n]);
    }
}

template <class A, class B, int MR, int NV>
inline void row_block(int64_t rows, const A* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t steps,
                      const B* b, int64_t b_stride, Sum<A>* c, int64_t ld_c, bool add, const Stream& stream) {
  if constexpr (MR > 1) {
    if (rows < MR) {
      row_block<A, B, MR - 1, NV>(rows, a, row_stride, tap_stride, taps, steps, b, b_stride, c, ld_c, add, stream);
      return;
    }
  }
  micro_kernel<A, B, MR, NV>(a, row_stride, tap_stride, taps, steps, b, b_stride, c, ld_c, add, stream);
}

// Rows per register block, so that MR * NV accumulators, NV columns and one broadcast fill the register file.
template <int NV>
constexpr int kBlockRows =
#if DCX_ISA >= 2
    NV == 3   ? 9
    : NV == 2 ? 13
              : 16;
#else
    NV == 6   ? 2
    : NV == 4 ? 3
    : NV == 3 ? 4
    : NV == 2 ? 6
              : 12;
#endif

// Weights that come next and memory that is written behind the product, fetched into L2 a few lines per register block:
// a slice of weights begins where no stream has been, so that the hardware would fetch its first lines only once they
// are missed.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 0;
  char* written = nullptr;
  int64_t written_bytes = 0;
  Stream stream = {};

  // The shares of one of `count` register blocks.
  static inline int64_t share(int64_t bytes, int64_t count) {
    return bytes > 0 ? round_up(ceil_div(bytes, count), 64) : 0;
  }
  inline void fetch(int64_t count, int64_t written_count) {
    const int64_t now = count < bytes ? count : bytes;
    for (int64_t i = 0; i < now; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += now;
    bytes -= now;
    const int64_t written_now = written_count < written_bytes ? written_count : written_bytes;
    for (int64_t i = 0; i < written_now; i += 64) __builtin_prefetch(written + i, 1, 2);
    written += written_now;
    written_bytes -= written_now;
  }
};

// NV vectors of a panel's columns, of `left` that are not done yet; rows in blocks of nearly equal size. Blocks of
// fewer than kFetchingRows leave what is to be fetched to the others.
template <class A, class B, int NV>
inline void panel_columns(int64_t m, const A* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t steps,
                          const B* b, int64_t b_stride, Sum<A>* c, int64_t ld_c, bool add, int64_t left, Ahead& ahead) {
  constexpr int MR = kBlockRows<NV>;
  const int64_t count = ceil_div(m, int64_t{MR}), share = Ahead::share(ahead.bytes, count),
                written_share = Ahead::share(ahead.written_bytes, count);
  const int64_t passes = ceil_div(left, NV * kLanes<Sum<A>>);
  for (int64_t block = 0; block < count; ++block) {
    const int64_t i = m * block / count, rows = m * (block + 1) / count - i;
    if (share + written_share > 0) ahead.fetch(share, written_share);
    if (rows >= kFetchingRows) ahead.stream.spread((passes * count - block) * taps * steps, steps);
    row_block<A, B, MR, NV>(rows, a + i * row_stride, row_stride, tap_stride, taps, steps, b, b_stride, c + i * ld_c,
                            ld_c, add, ahead.stream);
    ahead.stream = ahead.stream.after(taps, steps);
  }
}

// The first columns of a panel from `n` on, as many as NV vectors go into.
template <class A, class B, int NV>
inline void columns_by(int64_t& n, int64_t m, const A* a, int64_t row_stride, int64_t tap_stride, int64_t taps,
                       int64_t steps, const B* b, int64_t width, Sum<A>* c, int64_t ld_c, bool add, Ahead& ahead) {
  constexpr int64_t columns = NV * kLanes<Sum<A>>;
  for (; n + columns <= width; n += columns)
    panel_columns<A, B, NV>(m, a, row_stride, tap_stride, taps, steps, b + n, width, c + n, ld_c, add, width - n,
                            ahead);
}

// One panel (width columns) over one reduction block.
template <class A, class B>
void gemm_panel(int64_t m, const A* a, int64_t row_stride, int64_t tap_stride, int64_t taps, int64_t steps, const B* b,
                int64_t width, Sum<A>* c, int64_t ld_c, bool add, Ahead ahead) {
  int64_t n = 0;
#if DCX_ISA >= 2
  columns_by<A, B, 3>(n, m, a, row_stride, tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
#else
  // A few rows take more columns at once: memory gives weights half as fast when every third line of them is asked for.
  if (m <= kBlockRows<6>)
    columns_by<A, B, 6>(n, m, a, row_stride, tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
  if (m <= kBlockRows<4>)
    columns_by<A, B, 4>(n, m, a, row_stride, tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
  if (m <= kBlockRows<3>)
    columns_by<A, B, 3>(n, m, a, row_stride, tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
#endif
  columns_by<A, B, 2>(n, m, a, row_stride, tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
  columns_by<A, B, 1>(n, m, a, row_stride, tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
}

inline bool library_gemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
                         const float* a, const float* b, float* c) {
  const SmallGemm gemm = runtime().small_gemm;
  if (gemm == nullptr) return false;
  gemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c);
  return true;
}
template <class A, class B>
inline bool library_gemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const A*, const B*, Sum<A>*) {
  return false;
}

// The registers that a product leaves set up between its panels, for products of A's elements.
template <class A>
struct Registers {};
// Steps of the reduction in a block; whole blocks are multiples of a unit.
template <class A>
constexpr int64_t kBlockUnit = 1;
template <class B, class A>
inline int64_t block_steps(const GemmOperand<A>& op) {
  return ceil_div(op.block, kChannelsPerElement<B>);
}

// One panel (width columns) over one block of the reduction.
template <class A, class B>
inline void gemm_panel_by(Registers<A>&, int64_t m, const A* a, const GemmOperand<A>& op, int64_t taps, int64_t steps,
                          const B* b, int64_t width, Sum<A>* c, int64_t ld_c, bool add, Ahead ahead) {
  gemm_panel<A, B>(m, a, op.row_stride, op.tap_stride, taps, steps, b, width, c, ld_c, add, ahead);
}

#if DCX_ISA >= 4
template <>
struct Registers<Bf16> : TileRegisters {};
template <>
constexpr int64_t kBlockUnit<Bf16> = kTileSteps;
template <>
inline int64_t block_steps<Bf16Pair, Bf16>(const GemmOperand<Bf16>&) {
  return kTileBlock / 2;
}

inline void gemm_panel_by(Registers<Bf16>& registers, int64_t m, const Bf16* a, const GemmOperand<Bf16>& op,
                          int64_t taps, int64_t steps, const Bf16Pair* b, int64_t width, float* c, int64_t ld_c,
                          bool add, Ahead ahead) {
  const int64_t count = ceil_div(m, int64_t{kTileRows}), share = Ahead::share(ahead.bytes, count),
                written_share = Ahead::share(ahead.written_bytes, count);
  tile_panel(m, {a, op.row_stride, op.tap_stride, taps, steps, b, width, add}, c, ld_c, registers, [&](int64_t blocks) {
    if (share + written_share > 0) ahead.fetch(blocks * share, blocks * written_share);
  });
}
#endif

// One block of the reduction: a run of taps, or some steps of one tap.
struct Block {
  int64_t tap, taps, begin, end;
  bool add;
};

// Calls f with the blocks in order.
template <class B, class A, class F>
inline void for_each_block(const GemmOperand<A>& op, const F& f) {
  const int64_t steps = ceil_div(op.channels, kChannelsPerElement<B>);
  const int64_t length = block_steps<B>(op), units = ceil_div(steps, kBlockUnit<A>);
  const int64_t blocks_per_tap = ceil_div(steps, length);
  const int64_t taps_per_block = steps >= length ? 1 : length / steps;
  const auto cut = [&](int64_t block) { return minimum(units * block / blocks_per_tap * kBlockUnit<A>, steps); };
  for (int64_t tap = 0; tap < op.taps; tap += taps_per_block) {
    const int64_t taps = op.taps - tap < taps_per_block ? op.taps - tap : taps_per_block;
    for (int64_t block = 0; block < blocks_per_tap; ++block)
      f(Block{tap, taps, cut(block), cut(block + 1), tap > 0 || block > 0});
  }
}

// One panel, of `width` columns, over one block.
template <class A, class B>
inline void panel_block(Registers<A>& registers, int64_t m, const GemmOperand<A>& op, const Block& block,
                        const B* panel, int64_t width, Sum<A>* c, int64_t ld_c, Ahead ahead) {
  const int64_t all_steps = ceil_div(op.channels, kChannelsPerElement<B>), steps = block.end - block.begin;
  const A* a = op.a + block.tap * op.tap_stride + block.begin * kChannelsPerElement<B>;
  const B* slice = panel + (block.tap * all_steps + block.begin) * width;
  for (int64_t k = 0; k < block.taps; ++k)
    if (!library_gemm(m, width, steps, op.row_stride, width, ld_c, block.add || k > 0, a + k * op.tap_stride,
                      slice + k * all_steps * width, c)) {
      gemm_panel_by(registers, m, a, op, block.taps, steps, slice, width, c, ld_c, block.add, ahead);
      return;
    }
}

// A panel's first element.
template <class A, class B>
inline const B* panel_at(const GemmOperand<A>& op, const B* b, int64_t column) {
  return b + op.taps * ceil_div(op.channels, kChannelsPerElement<B>) * column;
}

}  // namespace

template <class A, class B>
void conv_gemm(int64_t m, const GemmOperand<A>& op, const B* b, int64_t columns, Sum<A>* c, int64_t ld_c) {
  if (m <= 0) return;
  const int64_t steps = ceil_div(op.channels, kChannelsPerElement<B>), panels = panel_count(columns);
  const bool streamed = op.taps * steps * columns * static_cast<int64_t>(sizeof(B)) > kStreamedBytes;
  Registers<A> registers;
  // Panels inside blocks: a block of the rows stays in L1 while the panels pass.
  for_each_block<B>(op, [&](const Block& block) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t n0 = panel_begin(columns, p), n1 = panel_begin(columns, p + 1);
      Ahead ahead;
      if (streamed) {
        // The same block of the next panel, or where the panels end about as much of the first one's next block.
        const int64_t slice = block.taps * (block.end - block.begin);
        const int64_t from = block.tap * steps + block.begin;
        if (p + 1 < panels)
          ahead = {.at = reinterpret_cast<const char*>(panel_at(op, b, n1) + from * (panel_begin(columns, p + 2) - n1)),
                   .bytes = slice * (panel_begin(columns, p + 2) - n1) * static_cast<int64_t>(sizeof(B))};
        else if (from + slice < op.taps * steps)
          ahead = {.at = reinterpret_cast<const char*>(b + (from + slice) * panel_begin(columns, 1)),
                   .bytes = (op.taps * steps - from - slice < slice ? op.taps * steps - from - slice : slice) *
                            panel_begin(columns, 1) * static_cast<int64_t>(sizeof(B))};
      }
      if (!block.add && op.later.bytes > 0) {  // the first block's panels fetch what is written afterwards
        const GemmFetch part = op.later.part(p, panels);
        ahead.written = part.at;
        ahead.written_bytes = part.bytes;
      }
      panel_block(registers, m, op, block, panel_at(op, b, n0), n1 - n0, c + n0, ld_c, ahead);
    }
  });
}

template <class A, class B>
void conv_gemm_panel(int64_t m, const GemmOperand<A>& op, const B* b, int64_t columns, int64_t panel, Sum<A>* c,
                     int64_t ld_c, const GemmClips& clips) {
  if (m <= 0) return;
  const int64_t n0 = panel_begin(columns, panel), width = panel_begin(columns, panel + 1) - n0;
  const int64_t steps = ceil_div(op.channels, kChannelsPerElement<B>);
  Registers<A> registers;
  for_each_block<B>(op, [&](const Block& block) {
    // As many weights as the block has lie behind it: its own product's, or those of the next one.
    const int64_t slice = block.taps * (block.end - block.begin) * width;
    const B* next = panel_at(op, b, n0) + (block.tap * steps + block.begin) * width + slice;
    Ahead ahead{.stream = {reinterpret_cast<const char*>(next), slice * static_cast<int64_t>(sizeof(B))}};
    if (!block.add) {
      ahead.written = op.later.at;
      ahead.written_bytes = op.later.bytes;
    }
    for (int64_t i = 0; i < clips.count; ++i) {
      GemmOperand<A> clip = op;
      clip.a += i * clips.a_step;
      panel_block(registers, m, clip, block, panel_at(op, b, n0), width, c + i * clips.c_step, ld_c, ahead);
      ahead = {};
    }
  });
}

#define DCX_INSTANTIATE(A, B)                                                                                       \
  template void conv_gemm<A, B>(int64_t, const GemmOperand<A>&, const B*, int64_t, Sum<A>*, int64_t);               \
  template void conv_gemm_panel<A, B>(int64_t, const GemmOperand<A>&, const B*, int64_t, int64_t, Sum<A>*, int64_t, \
                                      const GemmClips&);
DCX_INSTANTIATE(float, float)
DCX_INSTANTIATE(double, double)
DCX_INSTANTIATE(Bf16Kind::Tile, Bf16Pair)

}  // namespace DCX_NS
}  // namespace dcx
