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
#include "conv_few_finish.cuh"
#include "launch.cuh"

namespace dcx {

// p.stages: turns that shared memory holds, 0: all of them. p.per_tap: each row's taps stand apart in shared memory;
// else a clip's rows stand there once, p.segment of them, as where taps reach into each other.
template <class T, int kTiles>
struct ConvFew {
  using Params = ConvGemmParams;
  using Element = T;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kMinBlocks = kTiles > 1 ? 2 : 3;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true, kBesideOthers = true;
  static constexpr int kTileColumns = 16, kChunk = 64, kVector = Vector16<T>::kCount;
  static constexpr int kSliceBytes = kChunk * kTileColumns * 2, kStepBytes = kSliceBytes / 4;
  static constexpr int kTurn = 4;  // slices between two barriers
  static constexpr int kSumLd = kTileColumns + 4;
  static constexpr int kCopiers = kSliceBytes / 16, kRangesAtOnce = kThreads / kCopiers;
  static constexpr int kOwnRanges = kWarps / kRangesAtOnce;  // a warp each
  // Pieces of rows that a thread asks for between two looks at where they are, and that it snakes at once.
  static constexpr int kAtOnce = kTiles > 1 ? 4 : 2, kBatch = kTiles > 1 ? 4 : 2;
  using Finish = FewFinish<T, kTileColumns, kThreads, kSumLd>;
  static constexpr int kMostRows = Finish::kMostRows;

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
    int t, steps, clip;  // time of the row's first channel; of its clip: steps, and where it starts, in 16 bytes
  };
  static int64_t smem_bytes(const Params& p, int taps) {
    return int64_t{slices(p, taps)} * kSliceBytes + int64_t{slots(p, taps)} * (pitch(p) + int{sizeof(Slot)}) +
           int64_t{p.ranges} * most_rows(p) * kSumLd * 4 + int64_t{sizeof(typename Finish::Vectors)};
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
    uint32_t chunks[kOwnRanges];
  };
  static DCX_DEVICE int channel_of() { return thread_index() % kCopiers / 2; }  // of the slice
  static DCX_DEVICE Copies copies_of(const Params& p, const ConvPlace& at) {
    const int k = channel_of(), half = thread_index() % 2;
    const int wide = static_cast<int>(at.column) + half * kVector, columns = static_cast<int>(p.step_columns);
    const int beside = p.phases.stride > 0 ? wide / columns : 0;
    const int64_t before = beside * at.taps * p.channels_padded + at.weight_rows + k;
    Copies own{static_cast<const T*>(p.weight) + before * p.columns_padded + wide - beside * columns, {}};
    DCX_UNROLL
    for (int i = 0; i < kOwnRanges; ++i) {
      if (i * kRangesAtOnce >= p.ranges) break;
      const int range = thread_index() / kCopiers + i * kRangesAtOnce, first = chunks(p) * range / p.ranges;
      const int end = chunks(p) * (range + 1) / p.ranges;
      own.chunks[i] = range < p.ranges && wide < at.columns ? static_cast<uint32_t>(end << 16 | first) : 0;
    }
    return own;
  }
  // `slot`: among the range's slices in shared memory. kFetch: to L2 alone, for later.
  template <bool kFetch = false>
  static DCX_DEVICE void load_slice(const Params& p, const Copies& own, Walk walk, int taps, int slot,
                                    unsigned char* to) {
    const int deep = static_cast<int>(p.channels_padded), padded = static_cast<int>(p.columns_padded);
    const int k = channel_of();
    to += k * 32 + (thread_index() ^ (k / 4 & 1)) % 2 * 16;
    DCX_UNROLL
    for (int i = 0; i < kOwnRanges; ++i) {
      if (i * kRangesAtOnce >= p.ranges) break;
      const int range = thread_index() / kCopiers + i * kRangesAtOnce, first = static_cast<int>(own.chunks[i] & 0xffff);
      const int chunk = first + walk.chunk, slice = slot + (p.stages > 0 ? range * p.stages * kTurn : first * taps);
      if (chunk >= static_cast<int>(own.chunks[i] >> 16) || chunk * kChunk + k >= deep) continue;
      const T* from = own.from + (walk.tap * deep + chunk * kChunk) * padded;
      if (kFetch)
        prefetch_l2(from);
      else
        cp_async16(to + slice * kSliceBytes, from, true);
    }
  }

  // Which row of x each row in shared memory is.
  static DCX_DEVICE void fill_slots(const Params& p, const ConvPlace& at, Slot* to) {
    const int count = slots(p, at.taps), rows = tile_rows(p), own_rows = static_cast<int>(p.tile_rows);
    const int segment = static_cast<int>(p.segment);
    for (int i = thread_index(); i < count; i += kThreads) {
      const int tap = p.per_tap ? i / rows : 0, row = i - tap * rows, in_clip = p.per_tap ? own_rows : segment;
      const int item = p.tile_items > 1 ? row / in_clip : 0, within = row - item * in_clip;
      int64_t place = p.per_tap ? (at.row + within) * p.row_scale + tap * p.dilation : at.row * p.row_scale + within;
      place = (place + at.first) * p.row_step - p.pad_left;
      const int64_t steps = at.clip + item >= p.batch ? 0
                            : p.op_in_steps > 0       ? p.in_steps
                                                      : conv_in_valid(p, at.clip + item);
      to[i] = Slot{static_cast<int>(place), static_cast<int>(steps), item * static_cast<int>(p.x.stride_b / kVector)};
    }
  }

  // A thread's way through the rows: a cell of 16 bytes in some of them, then the cells behind where there are more
  // than threads. Snake's vectors are the first cell's.
  struct Reader {
    const T* x;
    int cell, first, across, at_once;
    int from[kAtOnce];  // where the next rows start, in 16 bytes; negative: zeros
    float alpha[kVector], inverse[kVector];

    // The step and the channel of a cell.
    static DCX_DEVICE void place(const Params& p, int cell, int& later, int& channel) {
      later = p.channels == p.in_channels ? 0 : cell * kVector / static_cast<int>(p.in_channels);
      channel = cell * kVector - later * static_cast<int>(p.in_channels);
    }
    // Outside its clip and past the channels a row is zero.
    DCX_DEVICE void take_rows(const Params& p, const Slot* slot_of, int count, int of, int row) {
      const int step = static_cast<int>(p.x.stride_t / kVector);
      int later, channel;
      place(p, of, later, channel);
      DCX_UNROLL
      for (int i = 0; i < kAtOnce; ++i, row += at_once) {
        from[i] = -1;
        if (row >= count || of * kVector >= p.channels) continue;
        const Slot own = slot_of[row];
        const int t = own.t + later;
        if (t >= 0 && t < own.steps) from[i] = own.clip + t * step + channel / kVector;
      }
    }
    DCX_DEVICE void take_alpha(const Params& p, int of) {
      int later, channel;
      place(p, of, later, channel);
      const bool there = p.alpha != nullptr && of * kVector < p.channels;
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) alpha[v] = there ? p.alpha[channel + v] : 0.0f;
    }
    DCX_DEVICE void invert() {
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v) inverse[v] = snake_inverse(alpha[v]);
    }
  };
  static DCX_DEVICE int cells(const Params& p) { return static_cast<int>(p.channels_padded) / kVector; }
  static DCX_DEVICE Reader reader_of(const Params& p, const ConvPlace& at, int count) {
    Reader own;
    own.x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b;
    hold(own.x);
    own.across = minimum(cells(p), kThreads);
    own.at_once = kThreads / own.across;
    own.first = thread_index() / own.across;
    own.cell = own.first < minimum(own.at_once, count) ? thread_index() - own.first * own.across : cells(p);
    if (own.cell < cells(p)) own.take_alpha(p, own.cell);
    return own;
  }
  // All rows as they lie in x, on their way at once.
  static DCX_DEVICE void copy_rows(const Params& p, Reader& own, const Slot* slot_of, int count, unsigned char* rows) {
    const int bytes = pitch(p);
    int cell = own.cell, first = own.first;
    while (cell < cells(p)) {
      DCX_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + i * own.at_once;
        const bool inside = own.from[i] >= 0;
        if (row < count)
          cp_async16(rows + row * bytes + cell * 16, own.x + int64_t{inside ? own.from[i] : 0} * kVector, inside);
      }
      first += kAtOnce * own.at_once;
      if (first >= count) {
        first = own.first;
        cell += own.across;
        if (cell >= cells(p)) break;
      }
      own.take_rows(p, slot_of, count, cell, first);
    }
    cp_async_commit();
  }
  // Snake on what this thread has copied.
  static DCX_DEVICE void snake_rows(const Params& p, Reader& own, const Slot* slot_of, int count, unsigned char* rows) {
    using Words = Vector16<uint32_t>;
    const int bytes = pitch(p);
    DCX_NO_UNROLL
    for (int cell = own.cell; cell < cells(p); cell += own.across) {
      int later, channel;
      Reader::place(p, cell, later, channel);
      if (cell * kVector >= p.channels) break;
      if (cell != own.cell) {
        own.take_alpha(p, cell);
        own.invert();
      }
      DCX_NO_UNROLL
      for (int first = own.first; first < count; first += own.at_once * kBatch) {
        Words values[kBatch];
        bool inside[kBatch];
        DCX_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          const int row = first + i * own.at_once;
          inside[i] = false;
          if (row >= count) continue;
          values[i] = *reinterpret_cast<const Words*>(rows + row * bytes + cell * 16);
          const int t = slot_of[row].t + later;
          inside[i] = t >= 0 && t < slot_of[row].steps;
        }
        DCX_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          if (!inside[i]) continue;
          const auto snaked = [&](int v) {
            return snake_as<T>(value_of<T>(values[i], v), own.alpha[v], own.inverse[v]);
          };
          Words out;
          DCX_UNROLL
          for (int w = 0; w < 4; ++w) out.values[w] = pack_pair<T>(snaked(2 * w), snaked(2 * w + 1));
          *reinterpret_cast<Words*>(rows + (first + i * own.at_once) * bytes + cell * 16) = out;
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

  // All that depends on the layer alone comes in front of the wait for the kernel in front, and costs no time where
  // that one still runs: weights, vectors, addresses. Behind it: rows and residual, Snake, products, sums, y.
  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    if (!p.weights_stand) grid_wait();
    const ConvPlace at = run_place<kTileColumns>(p);
    const int taps = at.taps, ranges = p.ranges, all = chunks(p), bytes = pitch(p);
    const int deep = static_cast<int>(p.channels_padded);
    const int count = (all + ranges - 1) / ranges * taps;  // of the longest range
    const int ring = p.stages * kTurn, in_turn = ring > 0 ? kTurn : count, turns = (count + in_turn - 1) / in_turn;
    const int filled_rows = tile_rows(p), most = most_rows(p), slot_count = slots(p, taps);
    unsigned char* rows = smem + slices(p, taps) * kSliceBytes;
    float* all_sums = reinterpret_cast<float*>(rows + slot_count * bytes);
    auto& vectors = *reinterpret_cast<typename Finish::Vectors*>(all_sums + ranges * most * kSumLd);
    Slot* slot_of = reinterpret_cast<Slot*>(&vectors + 1);
    const Copies copies = copies_of(p, at);

    Walk ahead{0, 0};               // the next slice to be copied in
    int issued = 0, issued_to = 0;  // turns; where in the ring the next one goes
    const auto issue = [&] {
      DCX_NO_UNROLL
      for (int i = 0; i < in_turn && issued * in_turn + i < count; ++i) {
        load_slice(p, copies, ahead, taps, issued_to + i, smem);
        ahead.advance(p, all, taps);
      }
      cp_async_commit();
      ++issued;
      issued_to = issued_to + in_turn < ring ? issued_to + in_turn : 0;
    };
    const int at_once = ring > 0 ? minimum(p.stages, turns) : turns;
    DCX_NO_UNROLL
    while (issued < at_once) issue();
    Walk later = ahead;
    DCX_NO_UNROLL
    for (int i = issued * in_turn; i < count; ++i) {
      load_slice<true>(p, copies, later, taps, 0, smem);
      later.advance(p, all, taps);
    }

    if (p.lengths != nullptr) grid_wait();
    Reader reader = reader_of(p, at, slot_count);
    fill_slots(p, at, slot_of);
    Finish::fill_vectors(p, at, vectors);
    auto share = Finish::share_of(p, at);
    const int warp = shuffle(thread_index() / kWarp, 0), lane = thread_index() % kWarp;
    const int range = warp % ranges, first_row = warp / ranges * kTiles * 8;
    const int first_chunk = all * range / ranges, own_chunks = all * (range + 1) / ranges - first_chunk;
    const int own_count = first_row < minimum(most, filled_rows) ? own_chunks * taps : 0;
    const unsigned char* slices_at = smem + (ring > 0 ? range * ring : first_chunk * taps) * kSliceBytes;
    slices_at += (lane / 16 * 8 + lane % 8) * 32 + (lane / 8 % 2 ^ lane % 8 / 4) * 16;
    const unsigned char* rows_at[kTiles];  // at the slice that comes next
    DCX_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const int row = first_row + i * 8 + lane % 8, item = p.tile_items == 1 ? 0 : row / static_cast<int>(p.tile_rows);
      const int within = row - item * static_cast<int>(p.tile_rows);
      const int slot = p.per_tap ? row : static_cast<int>(item * p.segment + within * p.row_scale);
      rows_at[i] = rows + (row < filled_rows ? slot : 0) * bytes + lane / 8 * 16 + first_chunk * (kChunk * 2);
    }
    // From slice to slice of the range, and from the last of a chunk (of a tap) to the next one's first.
    const int tap_bytes = (p.per_tap ? filled_rows : static_cast<int>(p.dilation)) * bytes;
    const int inner = p.tap_major ? own_chunks : taps, inner_bytes = p.tap_major ? kChunk * 2 : tap_bytes;
    const int outer_bytes = (p.tap_major ? tap_bytes : kChunk * 2) - (inner - 1) * inner_bytes;
    // Half a slice is empty where so many or fewer are left, of a tap where those are the outer ones.
    const bool halved = first_chunk + own_chunks == all && all * kChunk > deep;
    const int halves = !halved ? 0 : p.tap_major ? 1 : taps;
    sync_threads();  // slots
    reader.take_rows(p, slot_of, slot_count, reader.cell, reader.first);
    if (p.alpha != nullptr) reader.invert();
    grid_wait();
    copy_rows(p, reader, slot_of, slot_count, rows);
    Finish::load_residual(p, share);
    cp_async_wait<0>();  // rows
    if (p.alpha != nullptr) snake_rows(p, reader, slot_of, slot_count, rows);

    float sums[kTiles][4];
    DCX_UNROLL
    for (int i = 0; i < kTiles; ++i) DCX_UNROLL
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
    int moved = 0, inner_left = inner, left = own_count, ring_at = 0;
    DCX_NO_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      wait_pending(issued - turn - 1);
      sync_threads();
      if (turn > 0 && issued < turns) issue();
      const int here = minimum(in_turn, left);
      if (here <= 0) continue;
      const unsigned char* slice = slices_at + ring_at * kSliceBytes;
      ring_at = ring_at + in_turn < ring ? ring_at + in_turn : 0;
      const int until = left - here;
      Fragments even, odd;
      load(even, slice, rows_at, moved);
      DCX_NO_UNROLL
      for (;;) {
        const bool full = (p.tap_major ? inner_left : left) > halves;
        if (full) load(odd, slice + 2 * kStepBytes, rows_at, moved + kChunk);
        multiply(sums, even);
        --inner_left;
        moved += inner_left > 0 ? inner_bytes : outer_bytes;
        if (inner_left == 0) inner_left = inner;
        slice += kSliceBytes;
        const bool last = --left == until;
        if (!last) load(even, slice, rows_at, moved);
        if (full) multiply(sums, odd);
        if (last) break;
      }
    }

    if (own_count > 0) {
      float* to = all_sums + (range * most + first_row + lane % 4 * 2) * kSumLd + lane / 4;
      DCX_UNROLL
      for (int i = 0; i < kTiles; ++i) DCX_UNROLL
      for (int j = 0; j < 4; ++j) to[(i * 8 + j % 2) * kSumLd + j / 2 * 8] = sums[i][j];
    }
    sync_threads();  // sums
    Finish::run(p, share, all_sums, most * kSumLd, vectors);
  }
};

}  // namespace dcx
