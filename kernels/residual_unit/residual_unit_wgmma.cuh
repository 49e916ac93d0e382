// residual_unit.cuh's unit on Hopper's warpgroup products, bit for bit its result. A warpgroup owns 64 steps and all
// channels. Rows stand in shared memory as panels of 64 channels and are snaked there in place; a tap is the panels'
// start moved by d rows. The hidden values go from the sums through Snake to the 1x1's operand within registers, and
// the residual comes and y goes without a way through shared memory, where the next tile's rows arrive meanwhile.
// Weights stand there for good where they fit, else they stream through a ring. Blocks take tile after tile.
#pragma once
#include "wgmma_parts.cuh"

namespace dcx {

// kStages stages of kStep channels' weights; kStages = 0: all weights stay, kStep = kColumns.
template <class T, int kColumns, int kGroups, int kStep, int kStages, int kBlocks>
struct WgmmaUnit : WgmmaParts<T, kColumns, kGroups, 1> {
  using Parts = WgmmaParts<T, kColumns, kGroups, 1>;
  using typename Parts::Own;
  using typename Parts::Turn;
  using typename Parts::Where;
  using Params = FusedUnitParams;
  using Parts::kDeep;
  using Parts::kPanels;
  using Parts::kRowsAtOnce;
  using Parts::kTaps;
  using Parts::kTileRows;
  using Parts::kVector;
  static constexpr int kTeams = 1, kThreads = 128 * kGroups, kMinBlocks = kBlocks;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true, kWaitsItself = true;
  static constexpr int kChunks = kColumns / kStep, kStepDeep = kStep / 16;
  static constexpr bool kResident = kStages == 0;
  static constexpr int kRing = kResident ? 2 : kStages;
  static constexpr int kStageBytes = kPanels * kStep * kPanelRowBytes;
  static constexpr int kWeightBytes = kStageBytes * (kResident ? kTaps + 1 : kStages);
  // The 1x1's columns in two parts where all of their sums find no room beside its operand.
  static constexpr int kHead = kColumns > 96 ? kColumns - 64 : kColumns, kTail = kColumns - kHead;
  static_assert(kTail == 0 || kChunks <= kRing, "all of the 1x1's weights are there at once");
  static DCX_DEVICE int last_stage(int chunk) { return (kTaps * kChunks + chunk) % kRing; }
  static constexpr bool kLate = kColumns == 128;  // the next rows are fetched when the sums have left their registers
  static constexpr bool kEarly = kColumns <= 96;  // the residual has registers while the taps are multiplied
  static_assert(kChunks * kStep == kColumns && kStep % 16 == 0, "a tap is whole steps");
  static_assert(kResident ? kChunks == 1 : kStages >= 3, "a stage is filled two steps after its products began");
  static_assert(kStep * kPanelRowBytes % 1024 == 0, "panels start at multiples of 1024 bytes");

  static int64_t smem_bytes(int64_t dilation) {
    return kWeightBytes + kPanels * Parts::segment(dilation) * kPanelRowBytes + Parts::kVectorFloats * 4;
  }

  // Channels within..within + kStep of a tap's weights, zeros where they end.
  static DCX_DEVICE void load_weights(const Params& p, const Own& own, int tap, int within, unsigned char* to) {
    if (!own.active) return;
    const int wide = static_cast<int>(p.columns_padded), deep = static_cast<int>(p.channels_padded);
    const T* weight = static_cast<const T*>(p.weight);
    const int column = own.vector * kVector;
    const T* from = weight + (tap * deep + within + own.row) * wide + column;
    const bool whole = wide == kColumns && deep >= kColumns;
    to += own.vector / 8 * (kStep * kPanelRowBytes);
    DCX_UNROLL
    for (int k = 0; k < kStep; k += kRowsAtOnce) {
      if (kStep % kRowsAtOnce != 0 && k + own.row >= kStep) break;
      if (whole) {
        cp_async16(to + own.in_panel(k + own.row), from + k * kColumns, true);
      } else {
        const bool valid = column < wide && within + k + own.row < deep;
        cp_async16(to + own.in_panel(k + own.row), valid ? from + k * wide : weight, valid);
      }
    }
  }

  // The same of the 1x1's.
  static DCX_DEVICE void load_pointwise(const Params& p, int within, unsigned char* to) {
    Parts::template load_pointwise<kStep>(p, within, [&](int k, int word) {
      return to + word / 32 * (kStep * kPanelRowBytes) + panel_cell(k, word % 32 / 4) * 16 + word % 4 * 4;
    });
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    unsigned char* rows = smem + kWeightBytes;
    const int panel_bytes = p.segment * kPanelRowBytes, dilation = static_cast<int>(p.dilation);
    float* vectors = reinterpret_cast<float*>(rows + kPanels * panel_bytes);
    const float* pairs = vectors + 2 * kColumns;
    const Own own = Parts::own_cells(panel_bytes, 0);
    const int group = shuffle(thread_index() / 128, 0);  // known to be the warp's
    const Panel first = panel_at(rows + group * (64 * kPanelRowBytes), kPanelRowBytes);
    const Panel weights = panel_at(smem, kStep * kPanelRowBytes);
    const int count = kTileRows + (kTaps - 1) * dilation;
    // A step of the ring: its weights and all that threads wrote before are everyone's, then its products go out, and
    // the stage of the step before the last, whose products are done, is filled.
    const auto fill = [&](int step, int stage) {
      const int tap = step / kChunks, within = step % kChunks * kStep;
      if (tap < kTaps)
        load_weights(p, own, tap, within, smem + stage * kStageBytes);
      else if (tap == kTaps)
        load_pointwise(p, within, smem + stage * kStageBytes);
      cp_async_commit();
    };
    const auto stream = [&](int step, int stage, const auto& products) {
      cp_async_wait<kResident ? 0 : kStages - 3>();
      fence_async();
      sync_threads();
      wgmma_fence();
      products(moved(weights, stage * kStageBytes));
      wgmma_commit();
      fill(step + kRing - 2, stage >= 2 ? stage - 2 : stage + kRing - 2);
      wgmma_wait<1>();
    };
    // A tile's rows; to be committed. Past the last tile, and of a tile without valid steps, none.
    const auto fetch = [&](Turn turn) {
      if (!turn.there(p)) return;
      const Where of = Parts::place(p, turn);
      if (of.begin < of.out_valid) Parts::load_rows(p, of, own, of.begin - static_cast<int>(p.pad_left), count, rows);
    };
    if (!p.weights_stand) grid_wait();
    Parts::load_vectors(p, vectors, kThreads);
    if constexpr (kResident) {
      DCX_NO_UNROLL
      for (int tap = 0; tap < kTaps; ++tap) load_weights(p, own, tap, 0, smem + tap * kStageBytes);
      load_pointwise(p, 0, smem + kTaps * kStageBytes);
    } else {
      for (int step = 0; step < kStages - 2; ++step) fill(step, step);
    }
    if (p.weights_stand) grid_wait();
    Turn turn = Parts::first_turn(p, 0);
    fetch(turn);
    cp_async_commit();
    sync_threads();      // the vectors
    bool filled = true;  // the ring's first stages are on their way, in front of the rows

    DCX_NO_UNROLL
    while (turn.there(p)) {
      const Where at = Parts::place(p, turn);
      turn = turn.next(p);
      if (at.begin >= at.out_valid) {
        fetch(turn);
        cp_async_commit();
        Parts::clear_rows(p, at, own);
        continue;
      }
      if (kResident || filled) {
        cp_async_wait<0>();
      } else {
        sync_threads();  // the ring is free
        for (int step = 0; step < kStages - 2; ++step) fill(step, step);
        cp_async_wait<kResident ? 0 : kStages - 2>();
      }
      filled = false;
      Parts::snake_rows(own, count, vectors, rows);

      float sums[kColumns / 2];
      if constexpr (kResident) {
        fence_async();
        sync_threads();
        wgmma_fence();
        Parts::template multiply<kDeep, true>(sums, first, panel_bytes, 0, 0, weights);
        DCX_UNROLL
        for (int tap = 1; tap < kTaps; ++tap)
          Parts::template multiply<kDeep, false>(sums, moved(first, tap * dilation * kPanelRowBytes), panel_bytes, 0, 0,
                                                 moved(weights, tap * kStageBytes));
        wgmma_commit();
      } else {
        stream(0, 0, [&](Panel b) { Parts::template multiply<kStepDeep, true>(sums, first, panel_bytes, 0, 0, b); });
        int step = 1, stage = 1;
        const auto next = [&](Panel a, int chunk) {
          stream(step, stage, [&](Panel b) {
            Parts::template multiply<kStepDeep, false>(sums, a, panel_bytes, 0, chunk * kStepDeep, b);
          });
          ++step;
          stage = stage + 1 == kRing ? 0 : stage + 1;
        };
        DCX_UNROLL
        for (int chunk = 1; chunk < kChunks; ++chunk) next(first, chunk);
        DCX_NO_UNROLL
        for (int tap = 1; tap < kTaps; ++tap) {
          const Panel a = moved(first, tap * dilation * kPanelRowBytes);
          DCX_UNROLL
          for (int chunk = 0; chunk < kChunks; ++chunk) next(a, chunk);
        }
      }
      uint32_t old[2][kHead / 8];
      if constexpr (kEarly) Parts::template load_residual<kHead>(p, at, 0, old);
      wgmma_wait<0>();
      settle(sums);
      sync_threads();  // the rows' memory is free
      if constexpr (!kLate) fetch(turn);
      if constexpr (kResident) cp_async_commit();  // else with a stage's
      uint32_t hidden[kDeep][4];
      Parts::hide(sums, pairs, hidden);
      if constexpr (kLate) fetch(turn);
      float head[kHead / 2];
      if constexpr (kResident) {
        wgmma_fence();
        Parts::template multiply_hidden<kHead, kStepDeep>(head, hidden, 0, moved(weights, kTaps * kStageBytes));
        wgmma_commit();
      } else {
        DCX_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk)
          stream(kTaps * kChunks + chunk, last_stage(chunk), [&](Panel b) {
            Parts::template multiply_hidden<kHead, kStepDeep>(head, hidden, chunk * kStepDeep, b);
          });
      }
      wgmma_wait<0>();
      settle(head);
      if constexpr (kEarly)
        Parts::template finish<kHead>(p, at, 0, head, pairs, old);
      else
        Parts::template finish_late<0, kHead>(p, at, head, pairs);
      if constexpr (kTail > 0) {
        float tail[kTail / 2];
        wgmma_fence();
        DCX_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk)
          Parts::template multiply_hidden<kTail, kStepDeep>(
              tail, hidden, chunk * kStepDeep, moved(weights, last_stage(chunk) * kStageBytes + kHead * kStep * 2));
        wgmma_commit();
        uint32_t more[2][kTail / 8];
        Parts::template load_residual<kTail>(p, at, kHead, more);
        wgmma_wait<0>();
        settle(tail);
        Parts::template finish<kTail>(p, at, kHead, tail, pairs, more);
      }
    }
    cp_async_wait<0>();
  }
};

}  // namespace dcx
