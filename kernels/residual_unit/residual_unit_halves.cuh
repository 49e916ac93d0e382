// residual_unit_wgmma.cuh's unit for 129 to 192 channels with twice the threads: two warpgroups share 64 steps, so that
// Snake and what else stands around the products is spread over both. Of every 64 columns one half of the threads has
// the first 32 and the other half the last. A panel of rows is snaked while the products of the one in front of it are
// under way, and so are the hidden values, which go through shared memory here: each half needs all of them. The ring
// of weights and the rows of the next tile run on from tile to tile.
#pragma once
#include "wgmma_parts.cuh"

namespace dcx {

// kStages stages of 64 channels' weights.
template <class T, int kColumns, int kGroups, int kStages>
struct WgmmaHalves : WgmmaParts<T, kColumns, kGroups, 1> {
  using Parts = WgmmaParts<T, kColumns, kGroups, 1>;
  using typename Parts::Turn;
  using typename Parts::Where;
  using Params = FusedUnitParams;
  using Parts::kPanels;
  using Parts::kTaps;
  using Parts::kTileRows;
  static constexpr int kTeams = 1, kThreads = 2 * Parts::kTeamThreads, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true;
  static constexpr int kStep = kPanelColumns, kChunks = kColumns / kStep, kSteps = (kTaps + 1) * kChunks;
  static constexpr int kHalf = kColumns / 2;  // a half's columns
  static constexpr int kCellBytes = 16, kHalfRow = kPanelRowBytes / 2;
  static constexpr int kStepPanel = kStep * kPanelRowBytes, kStageBytes = kPanels * kStepPanel;
  static constexpr int kWeightBytes = kStages * kStageBytes;
  static constexpr int kHiddenPanel = kTileRows * kPanelRowBytes, kHiddenBytes = kPanels * kHiddenPanel;
  static constexpr int kRowsAtOnce = kThreads / 8;  // a thread moves the same cell of every panel
  static_assert(kColumns == 192, "a half has a panel and a half");
  static_assert(kStages >= 4 && kSteps % kStages == 0, "a step's stage is the same in every tile");
  static_assert(kStep % kRowsAtOnce == 0, "all threads copy weights");

  static int64_t smem_bytes(int64_t dilation) {
    return kWeightBytes + kHiddenBytes + kPanels * Parts::segment(dilation) * kPanelRowBytes + Parts::kVectorFloats * 4;
  }

  // This thread's cells: of row `row` and every kRowsAtOnce rows on, `place` bytes behind a panel's start.
  struct Cells {
    int row, cell, place;
  };
  static DCX_DEVICE Cells own_cells() {
    const int row = thread_index() / 8, cell = thread_index() % 8;
    return Cells{row, cell, panel_cell(row, cell) * kCellBytes};
  }

  // A stage has three panels: each half's first 64 columns, and the last 32 of both. Which those are: 32 of every 64.
  static DCX_DEVICE int column_of(int panel, int cell) {
    return panel < 2 ? cell / 4 * 64 + panel * 32 + cell % 4 * 8 : 128 + cell * 8;
  }
  static DCX_DEVICE Panel weights_of(unsigned char* smem, int half) {
    return panel_at(smem + half * kStepPanel, (2 - half) * kStepPanel + half * kHalfRow);
  }

  // A step's weights, kStep channels of a tap or of the 1x1, zeros where they end.
  static DCX_DEVICE void load_weights(const Params& p, const Cells& own, int step, unsigned char* to) {
    const int wide = static_cast<int>(p.columns_padded), deep = static_cast<int>(p.channels_padded);
    const T* weight = static_cast<const T*>(p.weight);
    to += own.place;
    if (wide == kColumns && deep == kColumns) {
      const int column = column_of(0, own.cell);
      const T* from = weight + ((step * kStep + own.row) * kColumns + column);
      DCX_UNROLL
      for (int panel = 0; panel < kPanels; ++panel) {
        const T* part = from + (column_of(panel, own.cell) - column);
        DCX_UNROLL
        for (int k = 0; k < kStep; k += kRowsAtOnce)
          cp_async16(to + panel * kStepPanel + k * kPanelRowBytes, part + k * kColumns, true);
      }
      return;
    }
    const int within = step % kChunks * kStep, first = step / kChunks * deep + within;
    DCX_NO_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = column_of(panel, own.cell);
      DCX_NO_UNROLL
      for (int k = own.row; k < kStep; k += kRowsAtOnce) {
        const bool valid = column < wide && within + k < deep;
        cp_async16(to + panel * kStepPanel + (k - own.row) * kPanelRowBytes,
                   valid ? weight + (first + k) * wide + column : weight, valid);
      }
    }
  }

  // The same of the 1x1's, whose columns are exchanged word by word within 32, as place_of_word has them.
  static DCX_DEVICE void load_pointwise(const Params& p, int step, unsigned char* to) {
    constexpr int kWarps = kThreads / kWarp;
    static_assert(kWarps % 8 == 0, "a word's rows have it in the same place");
    const int wide = static_cast<int>(p.columns_padded), deep = static_cast<int>(p.channels_padded);
    const int row = thread_index() / kWarp, lane = thread_index() % kWarp, half = lane / 16;
    const int within = step % kChunks * kStep + row;
    const T* weight = static_cast<const T*>(p.weight);
    const T* from = weight + (kTaps * deep + within) * wide + lane * 2;
    to += row * kPanelRowBytes + lane % 16 / 4 * 4;
    const bool whole = wide == kColumns && deep == kColumns;
    DCX_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {  // of channels: 32 words, of which each half has 16
      const int cell = (panel < 2 ? panel : half) * 4 + lane % 4, column = panel * kPanelColumns;
      unsigned char* at = to + (panel < 2 ? half : 2) * kStepPanel + (cell ^ row % 8) * kCellBytes;
      if (whole) {
        DCX_UNROLL
        for (int k = 0; k < kStep; k += kWarps) cp_async4(at + k * kPanelRowBytes, from + column + k * kColumns, true);
        continue;
      }
      DCX_NO_UNROLL
      for (int k = 0; k < kStep; k += kWarps) {
        const bool valid = column + lane * 2 < wide && within + k < deep;
        cp_async4(at + k * kPanelRowBytes, valid ? from + column + k * wide : weight, valid);
      }
    }
  }

  // Rows of x from step `begin` on, zero outside [0, in_valid).
  static DCX_DEVICE void load_rows(const Params& p, const Where& at, const Cells& own, int begin, int count,
                                   int panel_bytes, unsigned char* rows) {
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b;
    const T* from = x + (begin + own.row) * p.x.stride_t + own.cell * 8;
    const int channels = static_cast<int>(p.channels);
    unsigned char* to = rows + own.place;
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce) {
      const bool there = static_cast<unsigned>(begin + row) < static_cast<unsigned>(at.in_valid);
      DCX_UNROLL
      for (int panel = 0; panel < kPanels; ++panel) {
        const bool valid = there && panel * kPanelColumns + own.cell * 8 < channels;
        cp_async16(to + panel * panel_bytes, valid ? from + panel * kPanelColumns : x, valid);
      }
      from += kRowsAtOnce * p.x.stride_t;
      to += kRowsAtOnce * kPanelRowBytes;
    }
  }

  // Snake on the cells of a panel that this thread has copied, in place.
  static DCX_DEVICE void snake_rows(const Cells& own, int count, int panel, const float* vectors, unsigned char* rows) {
    const auto alpha = Parts::load_alpha(vectors, panel * 8 + own.cell);
    unsigned char* at = rows + own.place;
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce, at += kRowsAtOnce * kPanelRowBytes)
      Parts::snake_cell(alpha, at);
  }

  // += the products of kStep channels of one tap or of the 1x1.
  static DCX_DEVICE void multiply(float (&sums)[kHalf / 2], Panel rows, Panel weights) {
    DCX_UNROLL
    for (int i = 0; i < kStep / 16; ++i)
      wgmma_rows<T, kHalf, true>(sums, moved(rows, i * 32), moved(weights, i * 16 * kPanelRowBytes));
  }

  // A panel's hidden values, this thread's of both of its rows.
  static DCX_DEVICE void hide(const float* sums, int panel, int half, const float* pairs, unsigned char* hidden) {
    const int quarter = thread_index() % 4, row = Parts::own_row();
    const float* own = pairs + (panel * 8 + half * 4) * 32 + quarter * 8;
    unsigned char* to = hidden + panel * kHiddenPanel + row * kPanelRowBytes + quarter * 4;
    DCX_UNROLL
    for (int n = 0; n < 4; ++n) {
      const auto low = *reinterpret_cast<const Vector16<float>*>(own + n * 32);
      const auto inverse = *reinterpret_cast<const Pair<float>*>(own + n * 32 + 4);
      unsigned char* cell = to + ((half * 4 + n) ^ row % 8) * kCellBytes;
      DCX_UNROLL
      for (int second = 0; second < 2; ++second)
        *reinterpret_cast<uint32_t*>(cell + second * 8 * kPanelRowBytes) =
            Parts::hidden_word(sums + n * 4 + second * 2, low, inverse);
    }
  }

  // x where the residual is, of this thread's two rows.
  static DCX_DEVICE void load_residual(const Params& p, const Where& at, int half, uint32_t (&words)[kPanels][2][4]) {
    DCX_UNROLL
    for (int panel = 0; panel < kPanels; ++panel)
      Parts::template load_residual<32>(p, at, panel * 64 + half * 32, words[panel]);
  }

  // Zeros: a tile of y past out_valid.
  static DCX_DEVICE void clear_rows(const Params& p, const Where& at, const Cells& own) {
    T* to = static_cast<T*>(const_cast<void*>(p.y.data)) + at.clip * p.y.stride_b +
            (at.begin + own.row) * p.y.stride_t + own.cell * 8;
    const int count = minimum(kTileRows, static_cast<int>(p.out_steps) - at.begin);
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce, to += kRowsAtOnce * p.y.stride_t)
      for (int first = 0; first + own.cell * 8 < p.channels; first += kPanelColumns)
        *reinterpret_cast<Vector16<uint32_t>*>(to + first) = Vector16<uint32_t>{};
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    unsigned char* hidden = smem + kWeightBytes;
    unsigned char* rows = hidden + kHiddenBytes;
    const int panel_bytes = p.segment * kPanelRowBytes, dilation = static_cast<int>(p.dilation);
    float* vectors = reinterpret_cast<float*>(rows + kPanels * panel_bytes);
    const float* pairs = vectors + 2 * kColumns;
    const Cells own = own_cells();
    const int half = shuffle(thread_index() / Parts::kTeamThreads, 0);  // known to be the warp's
    const int group = shuffle(thread_index() / 128 % kGroups, 0);
    const Panel first = panel_at(rows + group * (64 * kPanelRowBytes), kPanelRowBytes);
    const Panel first_hidden = panel_at(hidden + group * (64 * kPanelRowBytes), kPanelRowBytes);
    const Panel weights = weights_of(smem, half);
    const int count = kTileRows + (kTaps - 1) * dilation;
    // A tile's rows. Past the last tile, and of a tile without valid steps, none.
    const auto fetch = [&](Turn turn) {
      if (!turn.there(p)) return;
      const Where of = Parts::place(p, turn);
      if (of.begin < of.out_valid)
        load_rows(p, of, own, of.begin - static_cast<int>(p.pad_left), count, panel_bytes, rows);
    };
    const auto start = [&](int step) {
      load_weights(p, own, step, smem + step * kStageBytes);
      cp_async_commit();
    };
    if (!p.weights_stand) grid_wait();
    DCX_NO_UNROLL
    for (int step = 0; step < 2; ++step) start(step);
    Parts::load_vectors(p, vectors, kThreads);
    if (p.weights_stand) grid_wait();
    Turn turn = Parts::first_turn(p, 0);
    fetch(turn);
    cp_async_commit();
    DCX_NO_UNROLL
    for (int step = 2; step < kStages - 2; ++step) start(step);
    cp_async_wait<kStages - 4>();
    sync_threads();  // the vectors

    DCX_NO_UNROLL
    while (turn.there(p)) {
      const Where at = Parts::place(p, turn);
      turn = turn.next(p);
      if (at.begin >= at.out_valid) {
        fetch(turn);
        cp_async_commit();
        clear_rows(p, at, own);
        cp_async_wait<0>();
        continue;
      }
      // A step of the ring: its weights and all that threads wrote before are everyone's, then its products go out, and
      // the stage of the step before the last, whose products are done, is filled; `more` is copied with it.
      const auto stream = [&](int step, int stage, float (&to_sums)[kHalf / 2], Panel a, const auto& more) {
        cp_async_wait<kStages - 3>();
        fence_async();
        sync_threads();
        wgmma_fence();
        multiply(to_sums, a, moved(weights, stage * kStageBytes));
        wgmma_commit();
        more();
        const int ahead = step + kStages - 2;
        unsigned char* to = smem + (stage >= 2 ? stage - 2 : stage + kStages - 2) * kStageBytes;
        if (ahead >= kSteps) {
          if (turn.there(p)) load_weights(p, own, ahead - kSteps, to);
        } else if (ahead >= kTaps * kChunks) {
          load_pointwise(p, ahead, to);
        } else {
          load_weights(p, own, ahead, to);
        }
        cp_async_commit();
        wgmma_wait<1>();
      };
      cp_async_wait<kChunks - 1>();  // the rows, which came with the 1x1's first step
      float sums[kHalf / 2] = {};
      Panel tap = first;
      int panel = 0, stage = 0;
      DCX_NO_UNROLL
      for (int step = 0; step < kTaps * kChunks; ++step) {
        if (step < kChunks) snake_rows(own, count, panel, vectors, rows + panel * panel_bytes);
        stream(step, stage, sums, moved(tap, panel * panel_bytes), [] {});
        if (++panel == kChunks) {
          panel = 0;
          tap = moved(tap, dilation * kPanelRowBytes);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      wgmma_wait<0>();
      settle(sums);
      float out[kHalf / 2] = {};
      uint32_t old[kPanels][2][4];
      DCX_UNROLL
      for (int panel = 0; panel < kChunks; ++panel) {
        constexpr int kFirst = kTaps * kChunks;
        hide(sums + panel * 16, panel, half, pairs, hidden);
        if (panel + 1 == kChunks) load_residual(p, at, half, old);
        stream(kFirst + panel, (kFirst + panel) % kStages, out, moved(first_hidden, panel * kHiddenPanel), [&] {
          if (panel == 0) fetch(turn);  // all threads have seen the rows' last products done
        });
      }
      wgmma_wait<0>();
      settle(out);
      DCX_UNROLL
      for (int panel = 0; panel < kPanels; ++panel)
        Parts::template finish<32>(p, at, panel * 64 + half * 32, out + panel * 16, pairs, old[panel]);
    }
    cp_async_wait<0>();
  }
};

}  // namespace dcx
