// conv_wgmma.cuh's sum, bit for bit, for the few rows of a streamed frame, whose cost is reading the weights: weights
// are the tensor core's 16 rows, the GEMM's rows its 8 columns. A block owns 16 columns of a run of phases and the
// whole reduction; a warp owns one of the reduction's ranges and kTiles times 8 rows. Weights go to shared memory in
// slices, 64 channels of one tap, as many of them at once as there is room for, and before the wait for the kernel in
// front; then come the rows, snaked on their way, and the ranges' sums meet in shared memory, where they are added in
// order. So a layer is one kernel: no pass for Snake, no sums in global memory.
//
// With p.tap_major the slices go tap by tap, and inside a tap channel by channel: residual_unit.cuh's order, in which
// there is one range.
#pragma once
#include "conv_finish.cuh"
#include "launch.cuh"

namespace dcx {

// p.stages: turns that shared memory holds, 0: all of them. p.per_tap: each row's taps stand apart in shared memory;
// else a clip's rows stand there once, p.segment of them, as where taps reach into each other.
template <class T, int kTiles>
struct ConvFew {
  using Params = ConvGemmParams;
  using Element = T;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kMinBlocks = kTiles > 2 ? 2 : 3;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true;
  static constexpr int kTileColumns = 16, kChunk = 64, kVector = Vector16<T>::kCount;
  static constexpr int kSliceBytes = kChunk * kTileColumns * 2, kStepBytes = kSliceBytes / 4;
  static constexpr int kTurn = 4;  // slices between two barriers
  static constexpr int kMostRows = kWarps * kTiles * 8, kSumLd = kTileColumns + 4;
  static constexpr int kCopiers = kSliceBytes / 16, kRangesAtOnce = kThreads / kCopiers;
  static constexpr int kOwnRanges = kWarps / kRangesAtOnce;  // a warp each
  static constexpr int kBatch = 4;                           // pieces of rows that a thread has under way

  static DCX_HOST_DEVICE int chunks(const Params& p) {
    return (static_cast<int>(p.channels_padded) + kChunk - 1) / kChunk;
  }
  // Rows that the warps of one range hold.
  static DCX_HOST_DEVICE int most_rows(const Params& p) { return kWarps / p.ranges * kTiles * 8; }
  static DCX_HOST_DEVICE int tile_rows(const Params& p) { return static_cast<int>(p.tile_rows * p.tile_items); }
  static DCX_HOST_DEVICE int slots(const Params& p, int taps) {
    return p.per_tap ? tile_rows(p) * taps : static_cast<int>(p.segment * p.tile_items);
  }
  // Bytes of a row in shared memory: 8 rows side by side lie in different banks.
  static DCX_HOST_DEVICE int pitch(const Params& p) { return static_cast<int>(p.channels_padded) * 2 + 16; }
  static DCX_HOST_DEVICE int slices(const Params& p, int taps) {
    return p.stages > 0 ? p.ranges * p.stages * kTurn : chunks(p) * taps;
  }
  struct Slot {
    int t, item;  // time of the row's first channel; its clip in the tile, -1: none
  };
  static int64_t smem_bytes(const Params& p, int taps) {
    return int64_t{slices(p, taps)} * kSliceBytes + int64_t{slots(p, taps)} * (pitch(p) + int{sizeof(Slot)}) +
           int64_t{p.ranges} * most_rows(p) * kSumLd * 4;
  }

  // Where a slice stands in its range.
  struct Walk {
    int chunk, tap;
    DCX_DEVICE void advance(const Params& p, int chunks, int taps) {
      if (p.tap_major) {
        if (++chunk < chunks) return;
        chunk = 0;
        ++tap;
      } else {
        if (++tap < taps) return;
        tap = 0;
        ++chunk;
      }
    }
  };

  // What a thread copies of a slice: 16 bytes, in each of some ranges, whose first chunk and, 16 bits on, the one
  // behind the last stand together, since registers are short; zeros where there is nothing to copy.
  struct Copies {
    const T* from;  // in the run's first channel
    int to, k;      // byte and channel of the slice
    uint32_t chunks[kOwnRanges];
  };
  static DCX_DEVICE Copies copies_of(const Params& p, const ConvPlace& at) {
    const int number = thread_index() % kCopiers, k = number / 2, half = number % 2;
    const int wide = static_cast<int>(at.column) + half * kVector, columns = static_cast<int>(p.step_columns);
    const int beside = wide / columns;
    const int64_t before = beside * at.taps * p.channels_padded + at.weight_rows + k;
    Copies own{static_cast<const T*>(p.weight) + before * p.columns_padded + wide - beside * columns,
               k * 32 + (half ^ (k / 4 & 1)) * 16,
               k,
               {}};
    DCX_UNROLL
    for (int i = 0; i < kOwnRanges; ++i) {
      const int range = thread_index() / kCopiers + i * kRangesAtOnce, first = chunks(p) * range / p.ranges;
      const int end = chunks(p) * (range + 1) / p.ranges;
      own.chunks[i] = range < p.ranges && wide < at.columns ? static_cast<uint32_t>(end << 16 | first) : 0;
    }
    return own;
  }
  // `slot`: among the range's slices in shared memory.
  static DCX_DEVICE void load_slice(const Params& p, const Copies& own, Walk walk, int taps, int slot,
                                    unsigned char* to) {
    const int deep = static_cast<int>(p.channels_padded), padded = static_cast<int>(p.columns_padded);
    DCX_UNROLL
    for (int i = 0; i < kOwnRanges; ++i) {
      const int range = thread_index() / kCopiers + i * kRangesAtOnce, first = static_cast<int>(own.chunks[i] & 0xffff);
      const int chunk = first + walk.chunk, slice = slot + (p.stages > 0 ? range * p.stages * kTurn : first * taps);
      if (chunk < static_cast<int>(own.chunks[i] >> 16) && chunk * kChunk + own.k < deep)
        cp_async16(to + own.to + slice * kSliceBytes, own.from + (walk.tap * deep + chunk * kChunk) * padded, true);
    }
  }

  // The small vectors, which may have left L2 since the last call, on their way there.
  static DCX_DEVICE void fetch_vectors(const Params& p, const ConvPlace& at) {
    constexpr int kLine = 128 / 4;
    if (p.alpha != nullptr)
      for (int64_t c = thread_index() * kLine; c < p.in_channels; c += kThreads * kLine) prefetch_l2(p.alpha + c);
    const int64_t column = (at.column + thread_index() % 2 * kVector) % p.step_columns;
    if (p.bias != nullptr && thread_index() < 2) prefetch_l2(p.bias + column);
    const float* snake = p.out_alpha != nullptr ? p.out_alpha : p.after_alpha;
    if (snake != nullptr && thread_index() < 2) prefetch_l2(snake + column);
  }

  // Which row of x each row in shared memory is.
  static DCX_DEVICE void fill_slots(const Params& p, const ConvPlace& at, Slot* to) {
    const int count = slots(p, at.taps), rows = tile_rows(p), own_rows = static_cast<int>(p.tile_rows);
    const int segment = static_cast<int>(p.segment);
    for (int i = thread_index(); i < count; i += kThreads) {
      const int row = p.per_tap ? i % rows : i;
      const int item = row / (p.per_tap ? own_rows : segment), within = row - item * (p.per_tap ? own_rows : segment);
      int64_t place =
          p.per_tap ? (at.row + within) * p.row_scale + i / rows * p.dilation : at.row * p.row_scale + within;
      place = (place + at.first) * p.row_step - p.pad_left;
      to[i] = Slot{static_cast<int>(place), at.clip + item < p.batch ? item : -1};
    }
  }

  // The rows of all channels, snaked; zeros outside their clip and past the channels.
  static DCX_DEVICE void load_rows(const Params& p, const ConvPlace& at, const Slot* slot_of, unsigned char* rows) {
    const int cells = static_cast<int>(p.channels_padded) / kVector, across = minimum(cells, kThreads);
    const int at_once = kThreads / across, count = slots(p, at.taps), bytes = pitch(p);
    const int in_channels = static_cast<int>(p.in_channels);
    if (thread_index() >= at_once * across) return;
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b;
    DCX_NO_UNROLL
    for (int cell = thread_index() % across; cell < cells; cell += across) {
      const int wide = cell * kVector, later = wide / in_channels, channel = wide - later * in_channels;
      const bool there = wide < p.channels, snakes = p.alpha != nullptr && there;
      DCX_NO_UNROLL
      for (int first = thread_index() / across; first < count; first += at_once * kBatch) {
        Vector16<T> values[kBatch];
        DCX_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          values[i] = Vector16<T>{};
          if (first + i * at_once >= count || !there) continue;
          const Slot own = slot_of[first + i * at_once];
          if (own.item < 0) continue;
          const int t = own.t + later;
          const int64_t steps = p.op_in_steps > 0 ? p.in_steps : conv_in_valid(p, at.clip + own.item);
          if (t < 0 || t >= steps) continue;
          values[i] = *reinterpret_cast<const Vector16<T>*>(x + own.item * p.x.stride_b + t * p.x.stride_t + channel);
        }
        if (snakes) {
          DCX_UNROLL
          for (int v = 0; v < kVector; ++v) {
            const float alpha = p.alpha[channel + v], inverse = snake_inverse(alpha);
            DCX_UNROLL
            for (int i = 0; i < kBatch; ++i)
              values[i].values[v] = from_float<T>(snake_as<T>(to_float(values[i].values[v]), alpha, inverse));
          }
        }
        DCX_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          if (first + i * at_once >= count) break;
          *reinterpret_cast<Vector16<T>*>(rows + (first + i * at_once) * bytes + cell * 16) = values[i];
        }
      }
    }
  }

  // Operands of two products of each tile: half of a slice.
  struct Fragments {
    uint32_t weights[2][4], rows[kTiles][4];
  };
  static DCX_DEVICE void load(Fragments& to, const unsigned char* slice, const unsigned char* const (&rows)[kTiles],
                              int moved) {
    ldmatrix_x4_trans(to.weights[0], slice);
    DCX_UNROLL
    for (int i = 0; i < kTiles; ++i) ldmatrix_x4(to.rows[i], rows[i] + moved);
    ldmatrix_x4_trans(to.weights[1], slice + kStepBytes);
  }
  static DCX_DEVICE void multiply(float (&sums)[kTiles][4], const Fragments& from) {
    DCX_UNROLL
    for (int step = 0; step < 2; ++step) {
      DCX_UNROLL
      for (int i = 0; i < kTiles; ++i)
        mma_16x8x16<T>(sums[i], from.weights[step], from.rows[i][step * 2], from.rows[i][step * 2 + 1]);
    }
  }

  // Waits until at most so many of the latest groups are under way.
  static DCX_DEVICE void wait_pending(int groups) {
    if (groups >= 6)
      cp_async_wait<6>();
    else if (groups >= 3)
      cp_async_wait<3>();
    else if (groups == 2)
      cp_async_wait<2>();
    else if (groups == 1)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    const ConvPlace at = run_place<kTileColumns>(p);
    const int taps = at.taps, ranges = p.ranges, all = chunks(p), deep = static_cast<int>(p.channels_padded);
    const int count = (all + ranges - 1) / ranges * taps, turns = (count + kTurn - 1) / kTurn;  // of the longest range
    const int ring = p.stages * kTurn, bytes = pitch(p), filled_rows = tile_rows(p), most = most_rows(p);
    unsigned char* rows = smem + slices(p, taps) * kSliceBytes;
    float* all_sums = reinterpret_cast<float*>(rows + slots(p, taps) * bytes);
    Slot* slot_of = reinterpret_cast<Slot*>(all_sums + ranges * most * kSumLd);
    const Copies copies = copies_of(p, at);

    Walk ahead{0, 0};  // the next slice to be copied in
    int issued = 0;    // turns
    const auto issue = [&] {
      const int first = ring > 0 ? issued % p.stages * kTurn : issued * kTurn;
      DCX_NO_UNROLL
      for (int i = 0; i < kTurn && issued * kTurn + i < count; ++i) {
        load_slice(p, copies, ahead, taps, first + i, smem);
        ahead.advance(p, all, taps);
      }
      cp_async_commit();
      ++issued;
    };
    if (!p.weights_stand) grid_wait();
    const int at_once = ring > 0 ? minimum(p.stages, turns) : turns;
    DCX_NO_UNROLL
    while (issued < at_once) issue();
    fetch_vectors(p, at);
    fill_slots(p, at, slot_of);
    sync_threads();
    if (p.weights_stand) grid_wait();
    load_rows(p, at, slot_of, rows);

    const int warp = shuffle(thread_index() / kWarp, 0), lane = thread_index() % kWarp;
    const int range = warp % ranges, first_row = warp / ranges * kTiles * 8;
    const int first_chunk = all * range / ranges, own_chunks = all * (range + 1) / ranges - first_chunk;
    const int own_count = first_row < minimum(most, filled_rows) ? own_chunks * taps : 0;
    const unsigned char* slices_at = smem + (ring > 0 ? range * ring : first_chunk * taps) * kSliceBytes;
    slices_at += (lane / 16 * 8 + lane % 8) * 32 + (lane / 8 % 2 ^ lane % 8 / 4) * 16;
    const unsigned char* rows_at[kTiles];
    DCX_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const int row = first_row + i * 8 + lane % 8, item = p.tile_items == 1 ? 0 : row / static_cast<int>(p.tile_rows);
      const int within = row - item * static_cast<int>(p.tile_rows);
      const int slot = p.per_tap ? row : static_cast<int>(item * p.segment + within * p.row_scale);
      rows_at[i] = rows + (row < filled_rows ? slot : 0) * bytes + lane / 8 * 16 + first_chunk * (kChunk * 2);
    }
    const int tap_bytes = (p.per_tap ? filled_rows : static_cast<int>(p.dilation)) * bytes;

    float sums[kTiles][4];
    DCX_UNROLL
    for (int i = 0; i < kTiles; ++i) DCX_UNROLL
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
    Walk now{0, 0};
    DCX_NO_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      wait_pending(issued - turn - 1);
      sync_threads();
      if (turn > 0 && issued < turns) issue();
      const int here = minimum(kTurn, own_count - turn * kTurn);
      if (here <= 0) continue;
      const unsigned char* slice = slices_at + (ring > 0 ? turn % p.stages : turn) * (kTurn * kSliceBytes);
      const auto moved = [&] { return now.tap * tap_bytes + now.chunk * (kChunk * 2); };
      Fragments even, odd;
      load(even, slice, rows_at, moved());
      DCX_NO_UNROLL
      for (int i = 0; i < here; ++i) {
        const bool full = deep - (first_chunk + now.chunk) * kChunk >= kChunk;
        if (full) load(odd, slice + 2 * kStepBytes, rows_at, moved() + kChunk);
        multiply(sums, even);
        now.advance(p, all, taps);
        slice += kSliceBytes;
        if (i + 1 < here) load(even, slice, rows_at, moved());
        if (full) multiply(sums, odd);
      }
    }

    if (own_count > 0) {
      float* to = all_sums + (range * most + first_row + lane % 4 * 2) * kSumLd + lane / 4;
      DCX_UNROLL
      for (int i = 0; i < kTiles; ++i) DCX_UNROLL
      for (int j = 0; j < 4; ++j) to[(i * 8 + j % 2) * kSumLd + j / 2 * 8] = 0.0f + sums[i][j];
    }
    sync_threads();
    if (ranges > 1) {
      DCX_NO_UNROLL
      for (int i = thread_index(); i < filled_rows * kTileColumns; i += kThreads) {
        float* own = all_sums + i / kTileColumns * kSumLd + i % kTileColumns;
        float total = own[0];
        DCX_NO_UNROLL
        for (int other = 1; other < ranges; ++other) total += own[other * most * kSumLd];
        own[0] = total;
      }
      sync_threads();
    }
    ConvFinish<T, kMostRows, kTileColumns, kThreads, kSumLd>::run(p, at, all_sums);
  }
};

}  // namespace dcx
