// conv_gemm.cuh's sum on Hopper's warpgroup products (wgmma.cuh), 16-bit. A block owns kGroups * 64 rows by kColumns
// columns of a run of phases and walks the channels in chunks of 64 and, inside a chunk, the taps: a step is one tap of
// one chunk. Rows stand in shared memory as a panel, so that a tap is the panel moved by rows; where rows of several
// clips share a block, or lie apart, each step brings its own rows (per_tap). Both operands are copied in behind the
// threads' back, kStages - 2 steps ahead; products of one step run while the next step is prepared. x is read as it
// lies, 16 bytes at a time, or as conv_rows.cuh has prepared it, snaked.
//
// Buffers: at the barrier of step s every product up to step s - 2 is done, so that the copies for step s + kStages - 2
// may take the place of step s - 2; the rows' ring is longer than the chunks that those steps touch.
#pragma once
#include "conv_finish.cuh"
#include "conv_rows.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

namespace dcx {

template <class T, int kGroups, int kColumns, int kStages, bool kRanged, int kBlocks>
struct ConvWgmma {
  using Params = ConvGemmParams;
  using Element = T;
  static constexpr int kThreads = 128 * kGroups, kMinBlocks = kBlocks;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true, kHasRanges = kRanged;
  static constexpr int kTileRows = 64 * kGroups, kTileColumns = kColumns;
  static constexpr int kChunk = kPanelColumns, kAhead = kStages - 2;
  static constexpr int kVector = Vector16<T>::kCount, kCells = kChunk / kVector;
  static constexpr int kPanels = (kColumns + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytes = kChunk * kPanelRowBytes, kStageBytes = kPanels * kPanelBytes;
  static constexpr int kRowsAtOnce = kThreads / kCells, kOwnRows = kTileRows / kRowsAtOnce;
  static constexpr int kSums = kColumns / 2, kSumLd = kColumns + 8;
  static_assert(kRowsAtOnce % 8 == 0 && kAhead > 0, "a thread's cells keep their place in a row");

  static int64_t row_bytes(const Params& p) { return round_up(p.segment, 8) * kPanelRowBytes; }
  static int64_t smem_bytes(const Params& p) {
    const int64_t tiles = p.stages * int64_t{kStageBytes} + p.row_buffers * row_bytes(p);
    const int64_t own = p.per_tap ? kTileRows * static_cast<int64_t>(sizeof(OwnRow)) : 0;
    return maximum(tiles + own, int64_t{kTileRows} * kSumLd * 4 + 16);
  }

  static DCX_DEVICE void* cell_at(unsigned char* panel, int row, int cell) {
    return panel + panel_cell(row, cell) * 16;
  }

  // The 16 bytes of weights that a thread copies in every step: where they lie behind the first tap's first channel,
  // and their channel of the chunk; past the columns there is none.
  static constexpr int kPerRow = kColumns / kVector, kCopies = (kChunk * kPerRow + kThreads - 1) / kThreads;
  struct Copies {
    int from[kCopies];
    int channel[kCopies];
  };
  static DCX_DEVICE Copies weight_copies(const Params& p, const ConvPlace& at) {
    Copies own;
    const int step_columns = static_cast<int>(p.step_columns), padded = static_cast<int>(p.columns_padded);
    const int phase_rows = at.taps * static_cast<int>(p.channels_padded);
    DCX_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const int number = i * kThreads + thread_index(), k = number / kPerRow;
      const int column = static_cast<int>(at.column) + number % kPerRow * kVector, beside = column / step_columns;
      own.from[i] = (beside * phase_rows + k) * padded + column - beside * step_columns;
      own.channel[i] = number < kChunk * kPerRow && column < at.columns ? k : 1 << 30;
    }
    return own;
  }
  // The weights of one step: 64 channels' rows, zeros past the channels and the columns.
  static DCX_DEVICE void load_weights(const Params& p, const Copies& own, const T* weight, int chunk, int tap,
                                      unsigned char* to) {
    const int channels = static_cast<int>(p.channels_padded), deep = channels - chunk * kChunk;
    const T* from = weight + int64_t{tap * channels + chunk * kChunk} * p.columns_padded;
    DCX_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const int number = i * kThreads + thread_index(), cell = number % kPerRow;
      if (kChunk * kPerRow % kThreads != 0 && number >= kChunk * kPerRow) break;
      const bool valid = own.channel[i] < deep;
      cp_async16(cell_at(to + cell / 8 * kPanelBytes, number / kPerRow, cell % 8), valid ? from + own.from[i] : weight,
                 valid);
    }
  }

  // A thread's cell of a chunk: where its channel lies in x. A GEMM row may hold several time steps side by side.
  struct Channel {
    int later, channel;  // time steps behind the row's first, channel of x
    bool valid;
  };
  static DCX_DEVICE Channel channel_of(const Params& p, int chunk) {
    const int wide = chunk * kChunk + thread_index() % kCells * kVector;
    if (p.channels == p.in_channels) return Channel{0, wide, wide < p.channels};
    const int in_channels = static_cast<int>(p.in_channels), later = wide / in_channels;
    return Channel{later, wide - later * in_channels, wide < p.channels};
  }

  static DCX_DEVICE int input_steps(const Params& p, int64_t clip) {
    return static_cast<int>(p.op_in_steps > 0 ? p.in_steps : conv_in_valid(p, clip));
  }

  // The rows of a chunk for all its taps.
  static DCX_DEVICE void load_segment(const Params& p, const ConvPlace& at, int steps, int chunk, unsigned char* to) {
    const Channel own = channel_of(p, chunk);
    const int row_step = static_cast<int>(p.row_step), rows = static_cast<int>(p.segment);
    int row = thread_index() / kCells;
    int t = static_cast<int>(at.row + at.first + row) * row_step - static_cast<int>(p.pad_left) + own.later;
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b + own.channel;
    const T* source = x + t * p.x.stride_t;
    const int64_t stride = kRowsAtOnce * row_step * p.x.stride_t;
    auto* cell = static_cast<unsigned char*>(cell_at(to, row, thread_index() % kCells));
    DCX_NO_UNROLL
    for (; row < rows; row += kRowsAtOnce) {
      const bool valid = own.valid && static_cast<unsigned>(t) < static_cast<unsigned>(steps);
      cp_async16(cell, valid ? source : x, valid);
      t += kRowsAtOnce * row_step;
      source += stride;
      cell += kRowsAtOnce * kPanelRowBytes;
    }
  }

  // A row of a tile that brings its rows anew for every step: the time of the first tap's first channel, its clip's
  // place in x and the steps that count there.
  struct OwnRow {
    int64_t clip;
    int t, steps;
  };
  static DCX_DEVICE void fill_own(const Params& p, const ConvPlace& at, OwnRow* rows) {
    const int row = thread_index(), tile_rows = static_cast<int>(p.tile_rows);
    if (row >= kTileRows) return;
    const int item = p.tile_items == 1 ? 0 : row / tile_rows;
    const int64_t clip = at.clip + item, q = at.row + row - item * tile_rows;
    const bool used = row < tile_rows * static_cast<int>(p.tile_items) && clip < p.batch;
    rows[row] =
        OwnRow{used ? clip * p.x.stride_b : 0, static_cast<int>((q * p.row_scale + at.first) * p.row_step - p.pad_left),
               used ? input_steps(p, clip) : 0};
  }
  static DCX_DEVICE void load_own(const Params& p, const OwnRow* rows, int chunk, int tap, unsigned char* to) {
    const Channel own = channel_of(p, chunk);
    const int shift = tap * static_cast<int>(p.dilation * p.row_step) + own.later;
    const T* x = static_cast<const T*>(p.x.data);
    DCX_UNROLL
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = thread_index() / kCells + i * kRowsAtOnce;
      const OwnRow place = rows[row];
      const int t = place.t + shift;
      const bool valid = own.valid && static_cast<unsigned>(t) < static_cast<unsigned>(place.steps);
      cp_async16(cell_at(to, row, thread_index() % kCells), valid ? x + place.clip + t * p.x.stride_t + own.channel : x,
                 valid);
    }
  }

  // Where a step stands in the reduction; taps are the faster index.
  struct Step {
    int chunk, tap, rows;  // rows: the buffer of its rows
    DCX_DEVICE void advance(int taps, bool own_rows, int buffers) {
      if (++tap == taps) {
        tap = 0;
        ++chunk;
      }
      if (tap == 0 || own_rows) rows = rows + 1 == buffers ? 0 : rows + 1;
    }
  };

  // Whole chunks, without a branch, in which products would wait for each other; what a chunk lacks is zeros.
  static DCX_DEVICE void multiply(float (&sums)[kSums], Panel rows, Panel weights) {
    wgmma_fence();
    DCX_UNROLL
    for (int k = 0; k < kChunk; k += 16)
      wgmma<T, kColumns>(sums, moved(rows, k * 2), moved(weights, k * kPanelRowBytes));
    wgmma_commit();
  }

  static DCX_DEVICE void store(const float (&sums)[kSums], float* out) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    DCX_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) DCX_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* to = out + (warp * 16 + half * 8 + lane / 4) * kSumLd + n * 8 + lane % 4 * 2;
      to[0] = sums[n * 4 + half * 2];
      to[1] = sums[n * 4 + half * 2 + 1];
    }
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    const ConvPlace at = run_place<kColumns>(p);
    unsigned char* stages = smem;
    unsigned char* rows = smem + p.stages * kStageBytes;
    const int row_bytes = (static_cast<int>(p.segment) + 7) / 8 * 8 * kPanelRowBytes;
    const int chunks = (static_cast<int>(p.channels_padded) + kChunk - 1) / kChunk, taps = at.taps;
    const int range = p.spread ? static_cast<int>(block_z()) : 0;
    const int first_chunk = chunks * range / p.ranges;
    const int end_chunk = p.spread ? chunks * (range + 1) / p.ranges : chunks;
    const int count = (end_chunk - first_chunk) * taps;
    const T* weight = static_cast<const T*>(p.weight) + at.weight_rows * p.columns_padded;
    const Copies copies = weight_copies(p, at);
    const bool per_tap = p.per_tap;

    // The first steps' weights come before the wait for what is in front of this kernel in the stream.
    if (!p.weights_stand) grid_wait();
    Step ahead{first_chunk, 0, 0};  // the next to be copied in
    DCX_NO_UNROLL
    for (int i = 0; i < kAhead && i < count; ++i) {
      load_weights(p, copies, weight, ahead.chunk, ahead.tap, stages + i * kStageBytes);
      ahead.advance(taps, false, 1);
    }
    if (p.weights_stand) grid_wait();
    const int steps = input_steps(p, at.clip);
    OwnRow* own = reinterpret_cast<OwnRow*>(rows + p.row_buffers * row_bytes);
    if (per_tap) {
      fill_own(p, at, own);
      sync_threads();
    }
    ahead = Step{first_chunk, 0, 0};
    int issued = 0;
    const auto issue = [&] {
      if (issued < count) {
        if (issued >= kAhead)
          load_weights(p, copies, weight, ahead.chunk, ahead.tap, stages + issued % p.stages * kStageBytes);
        unsigned char* to = rows + ahead.rows * row_bytes;
        if (per_tap)
          load_own(p, own, ahead.chunk, ahead.tap, to);
        else if (ahead.tap == 0)
          load_segment(p, at, steps, ahead.chunk, to);
        ahead.advance(taps, per_tap, p.row_buffers);
        ++issued;
      }
      cp_async_commit();
    };
    for (int i = 0; i < kAhead; ++i) issue();

    float sums[kSums], total[kSums];
    DCX_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = total[i] = 0.0f;
    Step now{first_chunk, 0, 0};
    int ranges_done = 0;
    int flush = kRanged && !p.spread ? chunks / p.ranges * taps : count;
    const int group_rows = thread_index() / 128 * 64;
    const int tap_bytes = per_tap ? 0 : static_cast<int>(p.dilation) * kPanelRowBytes;
    DCX_NO_UNROLL
    for (int step = 0; step < count; ++step) {
      cp_async_wait<kAhead - 1>();
      fence_async();
      sync_threads();
      const Panel a =
          moved(panel_at(rows + now.rows * row_bytes, 0), group_rows * kPanelRowBytes + now.tap * tap_bytes);
      const Panel b = panel_at(stages + step % p.stages * kStageBytes, kPanelBytes);
      multiply(sums, a, b);
      issue();
      now.advance(taps, per_tap, p.row_buffers);
      if (kRanged && step + 1 == flush) {
        wgmma_wait<0>();
        settle(sums);
        DCX_UNROLL
        for (int i = 0; i < kSums; ++i) {
          total[i] += sums[i];
          sums[i] = 0.0f;
        }
        ++ranges_done;
        flush = chunks * (ranges_done + 1) / p.ranges * taps;
      } else {
        wgmma_wait<1>();
      }
    }
    wgmma_wait<0>();
    settle(sums);
    if constexpr (!kRanged) {
      DCX_UNROLL
      for (int i = 0; i < kSums; ++i) total[i] += sums[i];
    }
    cp_async_wait<0>();
    sync_threads();  // the operands' memory is free
    float* shared_sums = reinterpret_cast<float*>(smem);
    if constexpr (kRanged) {
      uint32_t* flag = reinterpret_cast<uint32_t*>(shared_sums + kTileRows * kSumLd);
      if (p.spread && !gather_ranges<kThreads>(p, total, flag)) return;
    }
    store(total, shared_sums);
    sync_threads();
    conv_finish<T, kTileRows, kColumns, kThreads, kSumLd>(p, at, shared_sums);
  }
};

}  // namespace dcx
