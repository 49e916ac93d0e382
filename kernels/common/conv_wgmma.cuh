// conv_gemm.cuh's sum on Hopper's warpgroup products (wgmma.cuh), 16-bit. A block owns kGroups * 64 rows by kColumns
// columns of a run of phases and walks the channels in chunks of 64 and, inside a chunk, the taps: a step is one tap of
// one chunk. Rows stand in shared memory as a panel, so that a tap is the panel moved by rows; where rows of several
// clips share a block, or lie apart, each step brings its own rows (per_tap). Both operands are copied in behind the
// threads' back, kStages - 2 steps ahead; products of one step run while the next step is prepared. x is read as it
// lies, 16 bytes at a time, or as conv_rows.cuh has prepared it, snaked. kHelpers more warpgroups copy and finish,
// where blocks are so few that one warpgroup's instructions, one after the other, would be what takes time.
//
// Ranges of the reduction are added up inside one block, or, where that would leave multiprocessors idle, in blocks of
// their own, which are a cluster: each leaves its sums in its shared memory, and then adds up and finishes its share of
// the tile's rows.
//
// Buffers: at the barrier of step s every product up to step s - 2 is done, so that the copies for step s + kStages - 2
// may take the place of step s - 2; the rows' ring is longer than the chunks that those steps touch.
#pragma once
#include "conv_finish.cuh"
#include "conv_rows.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

namespace dcx {

template <class T, int kGroups, int kColumns, int kStages, bool kRanged, int kBlocks, int kHelpers = 0>
struct ConvWgmma {
  using Params = ConvGemmParams;
  using Element = T;
  static constexpr int kThreads = 128 * (kGroups + kHelpers), kMinBlocks = kBlocks;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true, kHasRanges = kRanged;
  static constexpr int kTileRows = 64 * kGroups, kTileColumns = kColumns;
  static constexpr int kChunk = kPanelColumns, kAhead = kStages - 2;
  static constexpr int kVector = Vector16<T>::kCount, kCells = kChunk / kVector;
  static constexpr int kPanels = (kColumns + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytes = kChunk * kPanelRowBytes, kStageBytes = kPanels * kPanelBytes;
  static constexpr int kRowsAtOnce = kThreads / kCells, kOwnRows = kTileRows / kRowsAtOnce;
  static constexpr int kSums = kColumns / 2, kSumLd = kColumns + 8;
  static_assert(kRowsAtOnce % 8 == 0 && kAhead > 0, "a thread's cells keep their place in a row");
  static_assert(kTileRows % kRowsAtOnce == 0, "threads have equally many rows of a tile");
  static constexpr int kMostRanges = 8;  // blocks of a cluster

  static int64_t row_bytes(const Params& p) { return round_up(p.segment, 8) * kPanelRowBytes; }
  static int64_t smem_bytes(const Params& p) {
    const int64_t tiles = p.stages * int64_t{kStageBytes} + p.row_buffers * row_bytes(p);
    const int64_t own = p.per_tap ? kTileRows * static_cast<int64_t>(sizeof(OwnRow)) : 0;
    // All of a tile's sums, and those rows that a block of a cluster adds up.
    const int64_t rows = kTileRows + (p.spread ? ceil_div(kTileRows, int64_t{p.ranges}) : 0);
    return maximum(tiles + own, rows * kSumLd * 4);
  }

  static DCX_DEVICE void* cell_at(unsigned char* panel, int row, int cell) {
    return panel + panel_cell(row, cell) * 16;
  }

  // The 16 bytes of weights that a thread copies in every step, kCopies times, kWeightRows of the chunk's channels
  // apart: where it stands on its walk over the steps. Rows a multiple of 8 apart have their cells in the same place.
  static constexpr int kPerRow = kColumns / kVector;
  static constexpr int kWeightRows = kThreads / kPerRow >= 64   ? 64
                                     : kThreads / kPerRow >= 32 ? 32
                                     : kThreads / kPerRow >= 16 ? 16
                                                                : 8;
  static constexpr int kCopies = kChunk / kWeightRows;
  static_assert(kWeightRows * kPerRow <= kThreads && kWeightRows % 8 == 0, "every cell has its thread");
  struct Weights {
    const T* from;
    unsigned char* to;  // in the first stage
    int left;           // channels from this thread's first one on, of the chunks that are left; none past the columns
    int tap, stage;
  };
  static DCX_DEVICE Weights first_weights(const Params& p, const ConvPlace& at, int chunk, unsigned char* stages) {
    const int step_columns = static_cast<int>(p.step_columns), padded = static_cast<int>(p.columns_padded);
    const int channels = static_cast<int>(p.channels_padded);
    const int k = thread_index() / kPerRow, cell = thread_index() % kPerRow;
    const int column = static_cast<int>(at.column) + cell * kVector, beside = column / step_columns;
    const bool counts = k < kWeightRows && column < at.columns;
    const int64_t row = at.weight_rows + int64_t{beside} * at.taps * channels + chunk * kChunk + k;
    return Weights{static_cast<const T*>(p.weight) + row * padded + (column - beside * step_columns),
                   stages + cell / 8 * kPanelBytes + panel_cell(k, cell % 8) * 16,
                   counts            ? channels - chunk * kChunk - k
                   : k < kWeightRows ? 0
                                     : -kChunk,
                   0, 0};
  }
  // Copies a step's weights, zeros past the channels and the columns, and goes on to the next step.
  static DCX_DEVICE void load_weights(const Params& p, int taps, Weights& own) {
    if (kWeightRows * kPerRow == kThreads || thread_index() < kWeightRows * kPerRow) {
      unsigned char* to = own.to + own.stage * kStageBytes;
      const T* from = own.from;
      DCX_UNROLL
      for (int i = 0; i < kCopies; ++i, from += kWeightRows * p.columns_padded)
        cp_async16(to + i * (kWeightRows * kPanelRowBytes), from, i * kWeightRows < own.left);
    }
    own.stage = own.stage + 1 == p.stages ? 0 : own.stage + 1;
    own.from += p.channels_padded * p.columns_padded;
    if (++own.tap == taps) {
      own.tap = 0;
      own.from += (kChunk - taps * p.channels_padded) * p.columns_padded;
      own.left -= kChunk;
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

  // The rows of a chunk for all its taps. A thread goes down a column of 16 bytes, and to the same rows of the next
  // chunk from chunk to chunk.
  struct Segment {
    const T* from;  // the thread's first row
    int t;
  };
  static DCX_DEVICE Segment first_segment(const Params& p, const ConvPlace& at, int chunk) {
    const Channel own = channel_of(p, chunk);
    const int row_step = static_cast<int>(p.row_step), row = thread_index() / kCells;
    const int t = static_cast<int>(at.row + at.first + row) * row_step - static_cast<int>(p.pad_left) + own.later;
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b + own.channel;
    return Segment{x + t * p.x.stride_t, t};
  }
  static DCX_DEVICE void load_segment(const Params& p, const ConvPlace& at, int steps, int chunk, Segment& own,
                                      unsigned char* to) {
    const int row_step = static_cast<int>(p.row_step);
    if (p.channels != p.in_channels) own = first_segment(p, at, chunk);  // several time steps side by side
    const T* source = own.from;
    const int64_t stride = kRowsAtOnce * row_step * p.x.stride_t;
    const int row = thread_index() / kCells;
    auto* cell = static_cast<unsigned char*>(cell_at(to, row, thread_index() % kCells));
    const bool there = chunk * kChunk + thread_index() % kCells * kVector < static_cast<int>(p.channels);
    int t = own.t, rows = static_cast<int>(p.segment) - row;
    const auto load = [&] {
      cp_async16(cell, source, there && static_cast<unsigned>(t) < static_cast<unsigned>(steps));
      t += kRowsAtOnce * row_step;
      source += stride;
      cell += kRowsAtOnce * kPanelRowBytes;
    };
    DCX_UNROLL
    for (int i = 0; i < kOwnRows; ++i) load();  // the tile's own rows, without a question
    DCX_NO_UNROLL
    for (rows -= kTileRows; rows > 0; rows -= kRowsAtOnce) load();
    own.from += kChunk;
  }

  // A row of a tile that brings its rows anew for every step: the first tap's first channel in x, its time, and the
  // steps that count there.
  struct alignas(16) OwnRow {
    const T* x;
    int t, steps;
  };
  static DCX_DEVICE void fill_own(const Params& p, const ConvPlace& at, OwnRow* rows) {
    const int row = thread_index(), tile_rows = static_cast<int>(p.tile_rows);
    if (row >= kTileRows) return;
    const int item = p.tile_items == 1 ? 0 : row / tile_rows;
    const int64_t clip = at.clip + item, q = at.row + row - item * tile_rows;
    const bool used = row < tile_rows * static_cast<int>(p.tile_items) && clip < p.batch;
    const int64_t t = (q * p.row_scale + at.first) * p.row_step - p.pad_left;
    const T* x = static_cast<const T*>(p.x.data);
    rows[row] = used ? OwnRow{x + (clip * p.x.stride_b + t * p.x.stride_t), static_cast<int>(t), input_steps(p, clip)}
                     : OwnRow{x, 0, 0};
  }
  static DCX_DEVICE void load_own(const Params& p, const OwnRow* rows, int chunk, int tap, unsigned char* to) {
    const Channel own = channel_of(p, chunk);
    const int shift = tap * static_cast<int>(p.dilation * p.row_step) + own.later;
    const int64_t beside = shift * p.x.stride_t + own.channel;
    rows += thread_index() / kCells;
    to = static_cast<unsigned char*>(cell_at(to, thread_index() / kCells, thread_index() % kCells));
    DCX_UNROLL
    for (int i = 0; i < kOwnRows; ++i) {
      const OwnRow place = rows[i * kRowsAtOnce];
      const bool valid = own.valid && static_cast<unsigned>(place.t + shift) < static_cast<unsigned>(place.steps);
      cp_async16(to + i * (kRowsAtOnce * kPanelRowBytes), place.x + beside, valid);
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

  struct alignas(8) SumPair {
    float low, high;
  };
  static DCX_DEVICE void store(const float (&sums)[kSums], float* out) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    DCX_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) DCX_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* to = out + (warp * 16 + half * 8 + lane / 4) * kSumLd + n * 8 + lane % 4 * 2;
      *reinterpret_cast<SumPair*>(to) = SumPair{sums[n * 4 + half * 2], sums[n * 4 + half * 2 + 1]};
    }
  }

  // The vectors that the end will want come to L2 now: nothing has read them since the last call.
  static DCX_DEVICE void call_vectors(const Params& p, const ConvPlace& at) {
    constexpr int kLine = 128 / static_cast<int>(sizeof(float));
    const int wide = static_cast<int>(at.column) + thread_index() * kLine;
    if (thread_index() * kLine >= kColumns || wide >= at.columns) return;
    const int column = wide % static_cast<int>(p.step_columns);
    if (p.bias != nullptr) prefetch_l2(p.bias + column);
    if (p.out_alpha != nullptr) prefetch_l2(p.out_alpha + column);
    if (p.after_alpha != nullptr) prefetch_l2(p.after_alpha + column);
  }

  template <bool kMultiplies>
  struct Role {
    static constexpr bool multiplies = kMultiplies;
  };

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
    const bool per_tap = p.per_tap;

    // The first steps' weights come before the wait for what is in front of this kernel in the stream.
    if (!p.weights_stand) grid_wait();
    Weights weights = first_weights(p, at, first_chunk, stages);  // of the next step to be copied in
    DCX_NO_UNROLL
    for (int i = 0; i < kAhead && i < count; ++i) load_weights(p, taps, weights);
    call_vectors(p, at);
    Segment segment = first_segment(p, at, first_chunk);
    if (p.weights_stand) grid_wait();
    const int steps = input_steps(p, at.clip);
    OwnRow* own = reinterpret_cast<OwnRow*>(rows + p.row_buffers * row_bytes);
    if (per_tap) {
      fill_own(p, at, own);
      sync_threads();
    }
    Step ahead{first_chunk, 0, 0};
    int issued = 0;
    const auto load_rows = [&] {
      unsigned char* to = rows + ahead.rows * row_bytes;
      if (per_tap)
        load_own(p, own, ahead.chunk, ahead.tap, to);
      else if (ahead.tap == 0)
        load_segment(p, at, steps, ahead.chunk, segment, to);
      ahead.advance(taps, per_tap, p.row_buffers);
      ++issued;
    };
    DCX_NO_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (issued < count) load_rows();
      cp_async_commit();
    }

    float sums[kSums], total[kSums];
    DCX_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = total[i] = 0.0f;
    const int tap_bytes = per_tap ? 0 : static_cast<int>(p.dilation) * kPanelRowBytes;
    const Panel first_rows = panel_at(rows, 0), first_stage = panel_at(stages, kPanelBytes);
    const int group_rows = shuffle(thread_index() / 128, 0) * (64 * kPanelRowBytes);  // known to be the warp's
    const auto walk = [&](auto role) {
      [[maybe_unused]] Step now{first_chunk, 0, 0};
      [[maybe_unused]] int ranges_done = 0, stage = 0;
      [[maybe_unused]] int flush = kRanged && !p.spread ? chunks / p.ranges * taps : count;
      DCX_NO_UNROLL
      for (int step = 0; step < count; ++step) {
        cp_async_wait<kAhead - 1>();
        fence_async();
        if constexpr (kHelpers > 0)
          sync_part(0, kThreads);  // both roles come here, each at a place of its own
        else
          sync_threads();
        if constexpr (role.multiplies)
          multiply(sums, moved(first_rows, now.rows * row_bytes + group_rows + now.tap * tap_bytes),
                   moved(first_stage, stage * kStageBytes));
        if (issued < count) {
          load_weights(p, taps, weights);
          load_rows();
        }
        cp_async_commit();
        if constexpr (role.multiplies) {
          now.advance(taps, per_tap, p.row_buffers);
          stage = stage + 1 == p.stages ? 0 : stage + 1;
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
      }
    };
    bool multiplies = true;
    if constexpr (kHelpers > 0) {
      multiplies = shuffle(thread_index() / 128, 0) < kGroups;
      if (multiplies)
        walk(Role<true>{});
      else
        walk(Role<false>{});
    } else {
      walk(Role<true>{});
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
    if (multiplies) store(total, shared_sums);
    const float* finished = shared_sums;
    int first = 0, end = kTileRows;
    const bool spread = kRanged && p.spread;
    if constexpr (kRanged) {
      if (spread) {
        cluster_sync();
        const int share = static_cast<int>(block_z());
        first = kTileRows * share / p.ranges;
        end = kTileRows * (share + 1) / p.ranges;
        float* mine = shared_sums + kTileRows * kSumLd;
        add_ranges<kThreads, kColumns, kSumLd, kMostRanges>(shared_sums + first * kSumLd, mine, end - first, p.ranges);
        finished = mine;
      }
    }
    sync_threads();
    if (spread) cluster_arrive();
    ConvFinish<T, kTileRows, kColumns, kThreads, kSumLd>::run(p, at, finished, first, end);
    if (spread) cluster_wait();  // until then others read this block's sums
  }
};

}  // namespace dcx
