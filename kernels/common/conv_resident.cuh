// conv_wgmma.cuh's sum for an upsampling of few channels over many rows, bit for bit its result: every phase has two
// taps, and nothing but a bias stands behind them. A block keeps the weights of kTogether units of 96 columns in shared
// memory and its warpgroups walk over tiles of 64 rows, each on its own: rows arrive in chunks of 64 channels in a ring
// of the warpgroup's, two chunks ahead and beyond a tile's end; sums go from registers straight to y. While one
// warpgroup writes, the others' products run.
//
// The units' columns stand in an order of their own, so that a thread's sums of a row are eight channels side by side.
#pragma once
#include "conv_finish.cuh"
#include "conv_rows.cuh"
#include "launch.cuh"
#include "wgmma_registers.cuh"

namespace dcx {

// kChannels: of a row, padded; a block has kSides operands of kColumns columns, of one run each.
template <class T, int kChannels, int kColumns, int kSides, int kGroups>
struct ConvResident {
  using Params = ConvGemmParams;
  using Element = T;
  static constexpr int kThreads = 128 * kGroups, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true;
  static constexpr int kUnit = 96, kTogether = kColumns * kSides / kUnit, kTaps = 2;
  static constexpr int kMostChannels = kChannels, kTileRows = 64, kTileGroups = kGroups;
  static constexpr int kVector = Vector16<T>::kCount;
  static constexpr int kChunk = kPanelColumns, kChunks = (kChannels + kChunk - 1) / kChunk;
  static constexpr int kPanelBytes = kChannels * kPanelRowBytes;  // 64 columns of a tap, or 32 of both
  static constexpr int kUnitPanels = 3;
  static constexpr int kReach = 8, kRowBytes = (kTileRows + kReach) * kPanelRowBytes;
  static constexpr int kBuffers = 4, kAhead = 2;
  static_assert(kColumns == kUnit || kColumns == 2 * kUnit, "columns of whole panels, or of one and a half");
  static_assert(kChannels % 32 == 0 && kChunks >= kAhead, "the chunks ahead are of this tile or the next one");

  // What a thread needs to write a vector of columns: the bias, and where it lies from phase 0's output on.
  struct alignas(16) Vector {
    float bias[kVector];
    int64_t offset;
    int phase;  // none past the columns
  };
  static constexpr int kNoPhase = 1 << 30;

  static int64_t smem_bytes(const Params&) {
    return kTogether * kUnitPanels * kPanelBytes + kGroups * kBuffers * kRowBytes +
           kTogether * kUnit / kVector * static_cast<int64_t>(sizeof(Vector));
  }

  // The units of a block, from `unit` on, and its place among the blocks that have them too.
  struct Share {
    int unit, units, turn, turns;
  };
  // Units that go together: two of a run where they are one operand, else two of any.
  static DCX_HOST_DEVICE int together(const Params& p, int unit) {
    if (kTogether == 1) return 1;
    int end = static_cast<int>(p.column_tiles);
    if (kSides == 1) {
      for (int run = p.run_count - 1; run > 0 && p.runs[run].tile > unit; --run) end = p.runs[run].tile;
    }
    return minimum(kTogether, end - unit);
  }
  // Blocks are shared out by the units' number; whether there is one for all.
  static bool shares_out(const Params& p, int64_t blocks) {
    const int units = static_cast<int>(p.column_tiles);
    for (int unit = 0, count; unit < units; unit += count)
      if ((count = together(p, unit)) * blocks < units) return false;
    return true;
  }
  static DCX_DEVICE Share share_of(const Params& p) {
    const int units = static_cast<int>(p.column_tiles), blocks = static_cast<int>(p.walking_blocks);
    const int block = static_cast<int>(block_x());
    int unit = 0, count = together(p, 0);
    while (block >= (unit + count) * blocks / units) {
      unit += count;
      count = together(p, unit);
    }
    const int first = unit * blocks / units;
    return Share{unit, count, block - first, (unit + count) * blocks / units - first};
  }
  static DCX_DEVICE const ConvRun& run_of(const Params& p, int unit) {
    int run = 0;
    while (run + 1 < p.run_count && p.runs[run + 1].tile <= unit) ++run;
    return p.runs[run];
  }

  // Where a pair of columns stands among a unit's, in pairs: wgmma_parts.cuh's place_of_word for whole 32s.
  static DCX_DEVICE int place_of_pair(int pair) { return pair - pair % 16 + pair % 4 * 4 + pair % 16 / 4; }

  // An operand's weights: a tap's panels of 64 columns; of 96 columns the last 32 of both taps share a panel.
  static DCX_DEVICE Panel weights_of(const unsigned char* at, int columns, int tap) {
    if (columns == kUnit)
      return panel_at(at + tap * kPanelBytes, (kTaps - tap) * kPanelBytes + tap * (kPanelRowBytes / 2));
    return panel_at(at + tap * kUnitPanels * kPanelBytes, kPanelBytes);
  }
  template <int kWide>
  static DCX_DEVICE void load_weights(const Params& p, int unit, unsigned char* to) {
    constexpr int kWarps = kThreads / kWarp;
    const ConvRun& run = run_of(p, unit);
    const int step_columns = static_cast<int>(p.step_columns), padded = static_cast<int>(p.columns_padded);
    const int deep = static_cast<int>(p.channels_padded), columns = run.phases * step_columns;
    const T* weight = static_cast<const T*>(p.weight);
    DCX_NO_UNROLL
    for (int pair = thread_index() % kWarp; pair < kWide / 2; pair += kWarp) {
      const int wide = (unit - run.tile) * kUnit + pair * 2, beside = wide / step_columns;
      const T* from = weight + int64_t{run.weight_taps + beside * kTaps} * deep * padded + wide - beside * step_columns;
      const int place = place_of_pair(pair), panel = place / 32, cell = place % 32 / 4;
      DCX_UNROLL
      for (int tap = 0; tap < kTaps; ++tap, from += deep * padded) {
        const int base = kWide != kUnit ? tap * kUnitPanels + panel : panel == 0 ? tap : kTaps;
        const int own = kWide == kUnit && panel == 1 ? cell + tap * 4 : cell;
        unsigned char* at = to + base * kPanelBytes + place % 4 * 4;
        const T* row = from + thread_index() / kWarp * padded;
        DCX_UNROLL_BY_4
        for (int k = thread_index() / kWarp; k < kChannels; k += kWarps, row += kWarps * padded)
          cp_async4(at + panel_cell(k, own) * 16, row, wide < columns && k < deep);
      }
    }
  }
  static DCX_DEVICE void fill_vectors(const Params& p, const Share& share, Vector* to) {
    const int step_columns = static_cast<int>(p.step_columns);
    for (int i = thread_index(); i < share.units * (kUnit / kVector); i += kThreads) {
      const ConvRun& run = run_of(p, share.unit + i / (kUnit / kVector));
      const int wide = (share.unit - run.tile) * kUnit + i * kVector, beside = wide / step_columns;
      const int column = wide - beside * step_columns;
      const bool there = wide < run.phases * step_columns;
      DCX_UNROLL
      for (int v = 0; v < kVector; ++v)  // as if added to a sum that began with a zero
        to[i].bias[v] = there && p.bias != nullptr ? p.bias[column + v] + 0.0f : 0.0f;
      to[i].phase = there ? run.phase + beside : kNoPhase;
      to[i].offset = (run.phase + beside) * p.y.stride_t + column;
    }
  }

  // Which tile: its number is divided once, behind that the next ones' clip and place are counted on.
  struct Turn {
    int clip, tile;
  };
  struct Step {
    int clips, tiles;
    DCX_DEVICE Turn after(Turn turn, int row_tiles) const {
      const int at = turn.tile + tiles, over = at >= row_tiles ? 1 : 0;
      return Turn{turn.clip + clips + over, at - over * row_tiles};
    }
  };

  // A tile's rows for a thread: x of its first cell, of chunks of 64 channels and of 32, and the time there; none
  // counts past the last tile.
  struct Cells {
    int row, cell, place;  // place: bytes, in a panel
  };
  static DCX_DEVICE Cells cells_of(bool whole) {
    const int thread = thread_index() % 128;
    const int row = whole ? thread / 8 : row_of_four_cells(thread);
    const int cell = whole ? thread % 8 : thread % 4;
    return Cells{row, cell, panel_cell(row, cell) * 16};
  }
  struct Rows {
    const T* x;
    int t, steps;
  };
  static DCX_DEVICE Rows rows_of(const Params& p, Turn turn, int lowest) {
    if (turn.clip >= p.batch) return Rows{static_cast<const T*>(p.x.data), 0, 0};
    const int t = turn.tile * kTileRows + lowest;
    return Rows{static_cast<const T*>(p.x.data) + turn.clip * p.x.stride_b + t * p.x.stride_t, t,
                static_cast<int>(conv_in_valid(p, turn.clip))};
  }
  // `count` rows of a chunk.
  static DCX_DEVICE void load_rows(const Params& p, const Rows& rows, const Cells& own, int chunk, int count,
                                   unsigned char* to) {
    const bool whole = chunk * kChunk + kChunk <= kChannels;
    const int at_once = whole ? 16 : 32, channel = chunk * kChunk + own.cell * kVector;
    const int64_t step = at_once * p.x.stride_t;
    const T* from = rows.x + own.row * p.x.stride_t + channel;
    const int steps = channel < p.channels ? rows.steps : 0;
    to += own.place;
    DCX_UNROLL
    for (int i = 0; i < kTileRows / (whole ? 16 : 32); ++i, from += step)
      cp_async16(to + i * at_once * kPanelRowBytes, from,
                 static_cast<unsigned>(rows.t + own.row + i * at_once) < static_cast<unsigned>(steps));
    if (kTileRows + own.row < count)
      cp_async16(to + kTileRows * kPanelRowBytes, from,
                 static_cast<unsigned>(rows.t + own.row + kTileRows) < static_cast<unsigned>(steps));
  }

  // A chunk's products; kFirst: the sums' first.
  template <int kWide>
  static DCX_DEVICE void multiply(float (&sums)[kWide / 2], int chunk, Panel rows, Panel first, Panel second) {
    DCX_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) DCX_UNROLL
    for (int k = chunk * kChunk; k < kChannels && k < (chunk + 1) * kChunk; k += 16) {
      const Panel a = moved(rows, tap * kPanelRowBytes + k % kChunk * 2);
      const Panel b = moved(tap == 0 ? first : second, k * kPanelRowBytes);
      if (tap == 0 && k == 0)
        wgmma_rows<T, kWide, false>(sums, a, b);
      else
        wgmma_rows<T, kWide, true>(sums, a, b);
    }
  }

  // A thread's two rows of a tile in y: where phase 0's output of the first one lies, how many outputs there are from
  // it on, and how many count; whole: the tile's all do.
  struct Outputs {
    T* y;
    int there, counting;
    bool whole;
  };
  static DCX_DEVICE Outputs outputs_of(const Params& p, Turn turn) {
    const int thread = thread_index() % 128, row = thread / kWarp * 16 + thread % kWarp / 4;
    const int64_t stride = p.phases.stride, begin = int64_t{turn.tile} * kTileRows * stride, t = begin + row * stride;
    const int64_t counting = minimum(p.out_steps, conv_out_valid(p, turn.clip));
    return Outputs{static_cast<T*>(const_cast<void*>(p.y.data)) + turn.clip * p.y.stride_b + t * p.y.stride_t,
                   static_cast<int>(minimum(p.out_steps - t, int64_t{kNoPhase})),
                   static_cast<int>(minimum(counting - t, int64_t{kNoPhase})), begin + kTileRows * stride <= counting};
  }

  // y of this thread's two rows; kWhole: all outputs count, and all columns are there.
  template <int kWide, bool kWhole>
  static DCX_DEVICE void finish(const Params& p, const Outputs& at, const float (&sums)[kWide / 2],
                                const Vector* vectors) {
    const int down = 8 * static_cast<int>(p.phases.stride);
    const int64_t down_y = down * p.y.stride_t;
    vectors += thread_index() % 4;
    DCX_UNROLL
    for (int i = 0; i < kWide / 32; ++i) {
      const Vector& own = vectors[i * 4];
      const int phase = kWhole ? 0 : own.phase;
      T* to = at.y + own.offset;
      Vector16<uint32_t> words[2];
      DCX_UNROLL
      for (int v = 0; v < kVector; v += 4) {
        const auto bias = *reinterpret_cast<const Vector16<float>*>(own.bias + v);
        DCX_UNROLL
        for (int half = 0; half < 2; ++half) DCX_UNROLL
        for (int n = 0; n < 2; ++n) {
          const float* sum = sums + (i * 4 + v / 2 + n) * 4 + half * 2;
          const uint32_t both = pack_pair<T>(sum[0] + bias.values[2 * n], sum[1] + bias.values[2 * n + 1]);
          words[half].values[v / 2 + n] = kWhole || phase + half * down < at.counting ? both : 0;
        }
      }
      DCX_UNROLL
      for (int half = 0; half < 2; ++half)
        if (kWhole || phase + half * down < at.there)
          *reinterpret_cast<Vector16<uint32_t>*>(to + half * down_y) = words[half];
    }
  }

  // All tiles of the share, kOperands of kWide columns.
  template <int kWide, int kOperands>
  static DCX_DEVICE void walk(const Params& p, const Share& share, unsigned char* smem, const Vector* vectors) {
    constexpr int kOperandBytes = kWide / kUnit * kUnitPanels * kPanelBytes;
    const int group = shuffle(thread_index() / 128, 0);  // known to be the warp's
    unsigned char* buffers = smem + kTogether * kUnitPanels * kPanelBytes + group * kBuffers * kRowBytes;
    const Panel first_rows = panel_at(buffers, 0);
    Panel weights[kOperands][kTaps];
    int shift[kOperands];
    const int lowest = run_of(p, share.unit).first;
    DCX_UNROLL
    for (int i = 0; i < kOperands; ++i) {
      shift[i] = (run_of(p, share.unit + i).first - lowest) * kPanelRowBytes;
      for (int tap = 0; tap < kTaps; ++tap) weights[i][tap] = weights_of(smem + i * kOperandBytes, kWide, tap);
    }
    bool all_columns = true;
    for (int i = 0; i < kWide * kOperands / kUnit; ++i) {
      const ConvRun& run = run_of(p, share.unit + i);
      all_columns = all_columns && (share.unit + i + 1 - run.tile) * kUnit <= run.phases * p.step_columns;
    }
    const int count = kTileRows + kTaps - 1 + shift[kOperands - 1] / kPanelRowBytes;
    const int row_tiles = static_cast<int>(p.row_tiles), batch = static_cast<int>(p.batch);
    const int number = share.turn * kGroups + group, turns = share.turns * kGroups;
    const Step step{turns / row_tiles, turns % row_tiles};
    const Cells whole = cells_of(true), half = cells_of(false);
    int filled = 0;  // the next buffer to be filled
    const auto load = [&](const Rows& rows, int chunk) {
      load_rows(p, rows, chunk * kChunk + kChunk <= kChannels ? whole : half, chunk, count,
                buffers + filled * kRowBytes);
      filled = filled + 1 == kBuffers ? 0 : filled + 1;
      cp_async_commit();
    };
    Turn turn{number / row_tiles, number % row_tiles};
    Rows rows = rows_of(p, turn, lowest);
    DCX_UNROLL
    for (int chunk = 0; chunk < kAhead; ++chunk) load(rows, chunk);
    cp_async_wait<kAhead>();
    fence_async();
    sync_threads();  // the weights and vectors
    int buffer = 0;
    DCX_NO_UNROLL
    while (turn.clip < batch) {
      const Turn following = step.after(turn, row_tiles);
      const Rows next = rows_of(p, following, lowest);
      float sums[kOperands][kWide / 2];
      DCX_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        cp_async_wait<kAhead - 1>();
        fence_async();
        sync_part(group, 128);
        wgmma_fence();
        DCX_UNROLL
        for (int i = 0; i < kOperands; ++i)
          multiply<kWide>(sums[i], chunk, moved(first_rows, buffer * kRowBytes + shift[i]), weights[i][0],
                          weights[i][1]);
        wgmma_commit();
        buffer = buffer + 1 == kBuffers ? 0 : buffer + 1;
        load(chunk + kAhead < kChunks ? rows : next, (chunk + kAhead) % kChunks);
        if (chunk + 1 < kChunks)
          wgmma_wait<1>();
        else
          wgmma_wait<0>();
      }
      const Outputs at = outputs_of(p, turn);
      DCX_UNROLL
      for (int i = 0; i < kOperands; ++i) settle(sums[i]);
      DCX_UNROLL
      for (int i = 0; i < kOperands; ++i) {
        if (at.whole && all_columns)
          finish<kWide, true>(p, at, sums[i], vectors + i * (kWide / kVector));
        else
          finish<kWide, false>(p, at, sums[i], vectors + i * (kWide / kVector));
      }
      turn = following;
      rows = next;
    }
    cp_async_wait<0>();
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    const Share share = share_of(p);
    auto* vectors =
        reinterpret_cast<Vector*>(smem + kTogether * kUnitPanels * kPanelBytes + kGroups * kBuffers * kRowBytes);
    const bool all = share.units == kTogether;
    if (!p.weights_stand) grid_wait();
    if (kColumns == kUnit || !all) {
      DCX_NO_UNROLL
      for (int i = 0; i < share.units; ++i)
        load_weights<kUnit>(p, share.unit + i, smem + i * kUnitPanels * kPanelBytes);
    } else {
      load_weights<kColumns>(p, share.unit, smem);
    }
    cp_async_commit();
    fill_vectors(p, share, vectors);
    if (p.weights_stand) grid_wait();
    if (kTogether == 1 || !all)
      walk<kUnit, 1>(p, share, smem, vectors);
    else
      walk<kColumns, kSides>(p, share, smem, vectors);
  }
};

}  // namespace dcx
