// residual_unit_wgmma.cuh's unit for 65 to 96 channels of a long signal: all weights stay in shared memory, which
// leaves room for one block. So two teams of warpgroups work in it, each on its own tiles and with barriers of its own:
// while one team's taps are multiplied, the other has the work around them. The last 32 channels of both teams' rows
// share a panel, and those columns of every two taps' weights do: 64 bytes of a row each.
#pragma once
#include "wgmma_parts.cuh"

namespace dcx {

template <class T, int kColumns, int kGroups>
struct WgmmaTeams : WgmmaParts<T, kColumns, kGroups, 2> {
  using Parts = WgmmaParts<T, kColumns, kGroups, 2>;
  using typename Parts::Own;
  using typename Parts::Turn;
  using typename Parts::Where;
  using Params = FusedUnitParams;
  using Parts::kDeep;
  using Parts::kTaps;
  using Parts::kTileRows;
  static constexpr int kTeams = 2, kThreads = kTeams * Parts::kTeamThreads, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true;
  static_assert(kColumns == 96, "a panel and a half");
  static constexpr int kPanel = kColumns * kPanelRowBytes;  // a tap's 64 columns, or two taps' last 32
  static constexpr int kFirstPanels = (kTaps + 1) * kPanel, kWeightBytes = kFirstPanels + (kTaps + 1) / 2 * kPanel;
  static constexpr int kHalf = kPanelRowBytes / 2;

  static int64_t smem_bytes(int64_t dilation) {
    return kWeightBytes + 3 * Parts::segment(dilation) * kPanelRowBytes + Parts::kVectorFloats * 4;
  }

  // A tap's weights: its last columns lie this far behind the first 64.
  static DCX_DEVICE Panel weights_of(const unsigned char* smem, int tap) {
    return panel_at(smem + tap * kPanel, kFirstPanels + tap / 2 * kPanel + tap % 2 * kHalf - tap * kPanel);
  }

  static DCX_DEVICE void load_weights(const Params& p, unsigned char* smem) {
    const int wide = static_cast<int>(p.columns_padded), deep = static_cast<int>(p.channels_padded);
    const T* weight = static_cast<const T*>(p.weight);
    DCX_NO_UNROLL
    for (int i = thread_index(); i < kTaps * kColumns * (kColumns / 8); i += kThreads) {
      const int vector = i % (kColumns / 8), k = i / (kColumns / 8) % kColumns, tap = i / (kColumns / 8) / kColumns;
      const bool valid = vector * 8 < wide && k < deep;
      const int to = vector < 8 ? tap * kPanel + panel_cell(k, vector) * 16
                                : kFirstPanels + tap / 2 * kPanel + panel_cell(k, vector - 8 + tap % 2 * 4) * 16;
      cp_async16(smem + to, valid ? weight + (tap * deep + k) * wide + vector * 8 : weight, valid);
    }
    Parts::template load_pointwise<kColumns>(p, 0, [&](int k, int word) {
      const int to = word < 32 ? kTaps * kPanel + panel_cell(k, word / 4) * 16
                               : kFirstPanels + kTaps / 2 * kPanel + panel_cell(k, word / 4 - 8 + kTaps % 2 * 4) * 16;
      return smem + to + word % 4 * 4;
    });
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    const int team = shuffle(thread_index() / Parts::kTeamThreads, 0);
    const int group = shuffle(thread_index() / 128 % kGroups, 0);
    const int segment_bytes = p.segment * kPanelRowBytes, dilation = static_cast<int>(p.dilation);
    unsigned char* all_rows = smem + kWeightBytes;
    unsigned char* rows = all_rows + team * segment_bytes;
    const int panel_bytes = (kTeams - team) * segment_bytes, shift = team * kHalf;
    float* vectors = reinterpret_cast<float*>(all_rows + 3 * segment_bytes);
    const float* pairs = vectors + 2 * kColumns;
    const Own own = Parts::own_cells(panel_bytes, shift);
    const Panel first = panel_at(rows + group * (64 * kPanelRowBytes), kPanelRowBytes);
    const int count = kTileRows + (kTaps - 1) * dilation;
    if (!p.weights_stand) grid_wait();
    load_weights(p, smem);
    Parts::load_vectors(p, vectors, kThreads);
    if (p.weights_stand) grid_wait();
    sync_threads();

    // Past the last tile there are no steps.
    const auto place = [&](Turn turn) { return turn.there(p) ? Parts::place(p, turn) : Where{-1, 0, 0, 0}; };
    const auto counts = [](const Where& at) { return at.begin < at.out_valid; };
    const auto sync_team = [&] { sync_part(team, Parts::kTeamThreads); };
    const auto fetch = [&](const Where& next) {
      if (counts(next)) Parts::load_rows(p, next, own, next.begin - static_cast<int>(p.pad_left), count, rows);
      cp_async_commit();
    };
    const auto prepare = [&](const Where& next) {
      cp_async_wait<0>();
      if (counts(next)) Parts::snake_rows(own, count, vectors, rows);
      fence_async();
    };
    Turn turn = Parts::first_turn(p, team);
    fetch(place(turn));
    prepare(place(turn));
    sync_threads();  // the weights are there for both teams

    DCX_NO_UNROLL
    while (turn.there(p)) {
      const Where at = place(turn);
      turn = turn.next(p);
      float sums[kColumns / 2];
      uint32_t old[2][kColumns / 8];
      if (counts(at)) {
        wgmma_fence();
        Parts::template multiply<kDeep, true>(sums, first, panel_bytes, shift, 0, weights_of(smem, 0));
        DCX_UNROLL
        for (int tap = 1; tap < kTaps; ++tap)
          Parts::template multiply<kDeep, false>(sums, moved(first, tap * dilation * kPanelRowBytes), panel_bytes,
                                                 shift, 0, weights_of(smem, tap));
        wgmma_commit();
        Parts::template load_residual<kColumns>(p, at, 0, old);
        wgmma_wait<0>();
        settle(sums);
      }
      sync_team();  // the taps have left the rows' memory
      const Where next = place(turn);
      fetch(next);
      if (counts(at)) {
        uint32_t hidden[kDeep][4];
        Parts::hide(sums, pairs, hidden);
        wgmma_fence();
        Parts::template multiply_hidden<kColumns, kDeep>(sums, hidden, 0, weights_of(smem, kTaps));
        wgmma_commit();
        wgmma_wait<0>();
        settle(sums);
        Parts::template finish<kColumns>(p, at, 0, sums, pairs, old);
      } else {
        Parts::clear_rows(p, at, own);
      }
      prepare(next);
      sync_team();
    }
  }
};

}  // namespace dcx
