// residual_unit.cuh's unit on Hopper's warpgroup products, bit for bit its result. A warpgroup owns 64 steps and all
// channels. Rows stand in shared memory as panels of 64 channels and are snaked there in place; a tap is the panels'
// start moved by d rows. The hidden values go from the sums through Snake to the 1x1's operand within registers; the
// residual's rows, which the block fetches again meanwhile, lie in the rows' place, where y replaces them. Weights
// stand in shared memory for good where they fit, else they stream through a ring. Blocks take tile after tile.
#pragma once
#include "residual_unit.cuh"
#include "wgmma_registers.cuh"

namespace dcx {

// The two values of a word.
template <class T>
DCX_DEVICE Pair<float> unpack_pair(uint32_t word) {
#ifdef __CUDACC__
  if constexpr (DTypeOf<T>::value == DType::kBF16) return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
#endif
  return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}

// kStages stages of kStep channels' weights; kStages = 0: all weights stay, kStep = kColumns.
template <class T, int kColumns, int kGroups, int kStep, int kStages, int kBlocks>
struct WgmmaUnit {
  using Params = FusedUnitParams;
  static constexpr int kThreads = 128 * kGroups, kMinBlocks = kBlocks;
  static constexpr bool kNeedsSm80 = true, kNeedsSm90a = true;
  static constexpr int kTileRows = 64 * kGroups, kTileColumns = kColumns;
  static constexpr int kTaps = static_cast<int>(kResidualUnitTaps);
  static constexpr int kPanels = (kColumns + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kDeep = kColumns / 16;  // products of a tap
  static constexpr int kChunks = kColumns / kStep, kStepDeep = kStep / 16;
  static constexpr bool kResident = kStages == 0;
  static constexpr int kRing = kResident ? 2 : kStages;
  static constexpr int kStageBytes = kPanels * kStep * kPanelRowBytes;
  static constexpr int kWeightBytes = kStageBytes * (kResident ? kTaps + 1 : kStages);
  static_assert(kChunks * kStep == kColumns && kStep % 16 == 0, "a tap is whole steps");
  static_assert(kResident ? kChunks == 1 : kStages >= 3, "a stage is filled two steps after its products began");
  static_assert(kStep * kPanelRowBytes % 1024 == 0, "panels start at multiples of 1024 bytes");
  // A thread moves cells of 16 bytes of one column; where rows are a multiple of 8 apart, their place stays the same.
  static constexpr int kVector = 8, kVectors = kColumns / kVector;
  static constexpr int kAtMost = kThreads / kVectors;
  static constexpr int kRowsAtOnce = kAtMost >= 8 ? kAtMost / 8 * 8 : kAtMost;
  static_assert(sizeof(T) == 2, "16-bit values");

  static int64_t segment(int64_t dilation) {
    return round_up(kTileRows + (kResidualUnitTaps - 1) * dilation, int64_t{8});
  }
  static int64_t smem_bytes(int64_t dilation) {
    return kWeightBytes + kPanels * segment(dilation) * kPanelRowBytes + kColumns * 6 * 4;
  }

  // A tile's place, the same for all threads.
  struct Where {
    int64_t clip;
    int begin, in_valid, out_valid;
  };
  // This thread's cells: its column's place in row `row` and every kRowsAtOnce rows on.
  struct Own {
    int row, vector, cell;
    bool active;
    // The byte in a panel where the column's cell of a row of this thread's stands.
    DCX_DEVICE int at(int r) const {
      return r * kPanelRowBytes + (kRowsAtOnce % 8 == 0 ? cell : (vector % 8 ^ r % 8) * 16);
    }
  };

  static DCX_DEVICE Own own_cells() {
    const int row = thread_index() / kVectors, vector = thread_index() % kVectors;
    return Own{row, vector, (vector % 8 ^ row % 8) * 16, row < kRowsAtOnce};
  }

  static DCX_DEVICE Where place(const Params& p, int tile) {
    const int per_clip = static_cast<int>(p.row_tiles);
    Where at{tile / per_clip, tile % per_clip * kTileRows, static_cast<int>(p.in_steps),
             static_cast<int>(p.out_steps)};
    if (p.lengths != nullptr) {
      const int64_t valid = maximum(int64_t{0}, minimum(p.lengths[at.clip], p.in_steps));
      at.in_valid = static_cast<int>(valid);
      at.out_valid =
          static_cast<int>(conv_output_steps(valid, kTaps, 1, p.dilation, p.pad_left, p.pad_right));
    }
    return at;
  }

  // Rows of x from step `begin` on, zero outside [0, in_valid).
  static DCX_DEVICE void load_rows(const Params& p, const Where& at, const Own& own, int begin, int count,
                                   unsigned char* rows) {
    if (!own.active) return;
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b;
    const T* from = x + (begin + own.row) * p.x.stride_t + own.vector * kVector;
    rows += own.vector / 8 * (p.segment * kPanelRowBytes);
    if (p.x.stride_t == kColumns && p.channels == kColumns && begin >= 0 && begin + count <= at.in_valid) {
      for (int row = own.row; row < count; row += kRowsAtOnce, from += kRowsAtOnce * kColumns)
        cp_async16(rows + own.at(row), from, true);
      return;
    }
    const bool counts = own.vector * kVector < p.channels;
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce, from += kRowsAtOnce * p.x.stride_t) {
      const bool valid = counts && static_cast<unsigned>(begin + row) < static_cast<unsigned>(at.in_valid);
      cp_async16(rows + own.at(row), valid ? from : x, valid);
    }
  }

  // Snake on the cells that this thread has copied, in place. `vectors`: alpha, then its inverse.
  static DCX_DEVICE void snake_rows(const Params& p, const Own& own, int count, const float* vectors,
                                    unsigned char* rows) {
    if (!own.active) return;
    float alpha[kVector], inverse[kVector];
    DCX_UNROLL
    for (int i = 0; i < kVector; i += 4) {
      const int channel = own.vector * kVector + i;
      const auto a = *reinterpret_cast<const Vector16<float>*>(vectors + channel);
      const auto b = *reinterpret_cast<const Vector16<float>*>(vectors + kColumns + channel);
      DCX_UNROLL
      for (int j = 0; j < 4; ++j) {
        alpha[i + j] = a.values[j];
        inverse[i + j] = b.values[j];
      }
    }
    rows += own.vector / 8 * (p.segment * kPanelRowBytes);
    for (int row = own.row; row < count; row += kRowsAtOnce) {
      unsigned char* at = rows + own.at(row);
      auto words = *reinterpret_cast<const Vector16<uint32_t>*>(at);
      DCX_UNROLL
      for (int i = 0; i < kVector; i += 2) {
        const Pair<float> x = unpack_pair<T>(words.values[i / 2]);
        words.values[i / 2] = pack_pair<T>(snake_as<T>(x.low, alpha[i], inverse[i]),
                                           snake_as<T>(x.high, alpha[i + 1], inverse[i + 1]));
      }
      *reinterpret_cast<Vector16<uint32_t>*>(at) = words;
    }
  }

  // Channels within..within + kStep of a tap's weights, zeros where they end.
  static DCX_DEVICE void load_weights(const Params& p, const Own& own, int tap, int within, unsigned char* to) {
    if (!own.active) return;
    const int wide = static_cast<int>(p.columns_padded), deep = static_cast<int>(p.channels_padded);
    const T* weight = static_cast<const T*>(p.weight);
    const int column = own.vector * kVector;
    const T* from = weight + (tap * deep + within + own.row) * wide + column;
    to += own.vector / 8 * (kStep * kPanelRowBytes);
    DCX_UNROLL
    for (int k = 0; k < kStep; k += kRowsAtOnce) {
      if (kStep % kRowsAtOnce != 0 && k + own.row >= kStep) break;
      const bool valid = column < wide && within + k + own.row < deep;
      cp_async16(to + own.at(k + own.row), valid ? from + k * wide : weight, valid);
    }
  }

  // The small vectors: alpha1, its inverse; then per pair of columns bias1, alpha2, its inverse and bias2, so that a
  // thread reads a pair's with two loads. Zeros past the channels.
  static DCX_DEVICE void load_vectors(const Params& p, float* to) {
    for (int c = thread_index(); c < kColumns; c += kThreads) {
      const bool valid = c < p.channels;
      const float alpha1 = valid ? p.alpha1[c] : 0.0f, alpha2 = valid ? p.alpha2[c] : 0.0f;
      to[c] = alpha1;
      to[kColumns + c] = valid ? snake_inverse(alpha1) : 0.0f;
      float* pair = to + 2 * kColumns + c / 2 * 8 + c % 2;
      pair[0] = valid && p.bias1 != nullptr ? p.bias1[c] : 0.0f;
      pair[2] = alpha2;
      pair[4] = valid ? snake_inverse(alpha2) : 0.0f;
      pair[6] = valid && p.bias2 != nullptr ? p.bias2[c] : 0.0f;
    }
  }

  // Products of kCount times 16 channels of one tap, from the k-th 16 on; kStarts: the sums' first.
  template <int kCount, bool kStarts>
  static DCX_DEVICE void multiply(float (&sums)[kColumns / 2], Panel rows, int panel_bytes, int first, Panel weights) {
    DCX_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int k = first + i;
      const Panel a = moved_within(rows, k / 4 * panel_bytes + k % 4 * 32), b = moved_within(weights, i * 2048);
      if (kStarts && i == 0)
        wgmma_rows<T, kColumns, false>(sums, a, b);
      else
        wgmma_rows<T, kColumns, true>(sums, a, b);
    }
  }

  static DCX_DEVICE void multiply_hidden(float (&sums)[kColumns / 2], const uint32_t (&hidden)[kDeep][4], int first,
                                         Panel weights) {
    DCX_UNROLL
    for (int i = 0; i < kStepDeep; ++i) {
      if (first + i == 0)
        wgmma_hidden<T, kColumns, false>(sums, hidden[first + i], moved_within(weights, i * 2048));
      else
        wgmma_hidden<T, kColumns, true>(sums, hidden[first + i], moved_within(weights, i * 2048));
    }
  }

  // + bias1, Snake and rounding; the sums of 16 columns become an operand of the 1x1.
  static DCX_DEVICE void hide(const float (&sums)[kColumns / 2], const float* pairs, uint32_t (&hidden)[kDeep][4]) {
    const float* own = pairs + thread_index() % 4 * 8;
    DCX_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const auto low = *reinterpret_cast<const Vector16<float>*>(own + n * 32);
      const auto inverse = *reinterpret_cast<const Pair<float>*>(own + n * 32 + 4);
      DCX_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float* sum = sums + n * 4 + half * 2;
        hidden[n / 2][n % 2 * 2 + half] =
            pack_pair<T>(snake_as<T>(sum[0] + low.values[0], low.values[2], inverse.low),
                         snake_as<T>(sum[1] + low.values[1], low.values[3], inverse.high));
      }
    }
  }

  // + bias2 + the residual, rounded, in the residual's place.
  static DCX_DEVICE void add_residual(const Params& p, const float (&sums)[kColumns / 2], const float* pairs,
                                      unsigned char* rows) {
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16 + lane / 4;
    const float* own = pairs + lane % 4 * 8 + 6;
    const int first = row * kPanelRowBytes + lane / 4 * 16 + lane % 4 * 4;
    constexpr int kAtOnce = 2;  // loads that are under way together
    DCX_UNROLL
    for (int first_n = 0; first_n < kColumns / 8; first_n += kAtOnce) {
      const auto at = [&](int n, int half) {
        return reinterpret_cast<uint32_t*>(rows + n / 8 * (p.segment * kPanelRowBytes) + (first ^ n % 8 * 16) +
                                           half * 8 * kPanelRowBytes);
      };
      uint32_t words[kAtOnce][2];
      Pair<float> bias[kAtOnce];
      DCX_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        words[i][0] = *at(first_n + i, 0);
        words[i][1] = *at(first_n + i, 1);
        bias[i] = *reinterpret_cast<const Pair<float>*>(own + (first_n + i) * 32);
      }
      DCX_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        DCX_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Pair<float> old = unpack_pair<T>(words[i][half]);
          const float* sum = sums + (first_n + i) * 4 + half * 2;
          *at(first_n + i, half) = pack_pair<T>(sum[0] + bias[i].low + old.low, sum[1] + bias[i].high + old.high);
        }
      }
    }
  }

  // The tile's rows of y, zeros from out_valid on.
  static DCX_DEVICE void store_rows(const Params& p, const Where& at, const Own& own, const unsigned char* rows) {
    if (!own.active || own.vector * kVector >= p.channels) return;
    T* to = static_cast<T*>(const_cast<void*>(p.y.data)) + at.clip * p.y.stride_b +
            (at.begin + own.row) * p.y.stride_t + own.vector * kVector;
    const unsigned char* from = rows + own.vector / 8 * (p.segment * kPanelRowBytes);
    const int count = minimum(kTileRows, static_cast<int>(p.out_steps) - at.begin);
    if (p.y.stride_t == kColumns && at.begin + kTileRows <= minimum(at.out_valid, static_cast<int>(p.out_steps))) {
      DCX_UNROLL
      for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
        if (kTileRows % kRowsAtOnce != 0 && i + own.row >= kTileRows) break;
        *reinterpret_cast<Vector16<uint32_t>*>(to + i * kColumns) =
            *reinterpret_cast<const Vector16<uint32_t>*>(from + own.at(i + own.row));
      }
      return;
    }
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce, to += kRowsAtOnce * p.y.stride_t) {
      Vector16<uint32_t> words{};
      if (at.begin + row < at.out_valid) words = *reinterpret_cast<const Vector16<uint32_t>*>(from + own.at(row));
      *reinterpret_cast<Vector16<uint32_t>*>(to) = words;
    }
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    unsigned char* rows = smem + kWeightBytes;
    const int panel_bytes = p.segment * kPanelRowBytes, dilation = static_cast<int>(p.dilation);
    float* vectors = reinterpret_cast<float*>(rows + kPanels * panel_bytes);
    const float* pairs = vectors + 2 * kColumns;
    const Own own = own_cells();
    const int group = shuffle(thread_index() / 128, 0);  // known to be the warp's
    const Panel first = panel_at(rows + group * (64 * kPanelRowBytes), kPanelRowBytes);
    const Panel weights = panel_at(smem, kStep * kPanelRowBytes);
    const int count = kTileRows + (kTaps - 1) * dilation;
    int step = 0, stage = 0, filled = kRing - 2;  // of the ring: the step's number, its stage, the one to fill next
    const auto fill = [&](int which) {
      if (which < (kTaps + 1) * kChunks)
        load_weights(p, own, which / kChunks, which % kChunks * kStep, smem + which % kRing * kStageBytes);
      cp_async_commit();
    };
    // One step: its weights and all that threads wrote before are everyone's, then its products go out, and the stage
    // of the step before the last, whose products are done, is filled.
    const auto stream = [&](const auto& products) {
      cp_async_wait<kResident ? 0 : kStages - 3>();
      fence_async();
      sync_threads();
      wgmma_fence();
      products(moved_within(weights, stage * kStageBytes));
      wgmma_commit();
      if (const int which = step + kStages - 2; which < (kTaps + 1) * kChunks)
        load_weights(p, own, which / kChunks, which % kChunks * kStep, smem + filled * kStageBytes);
      cp_async_commit();
      wgmma_wait<1>();
      ++step;
      stage = stage + 1 == kRing ? 0 : stage + 1;
      filled = filled + 1 == kRing ? 0 : filled + 1;
    };
    load_vectors(p, vectors);
    if constexpr (kResident) {
      DCX_NO_UNROLL
      for (int tap = 0; tap <= kTaps; ++tap) load_weights(p, own, tap, 0, smem + tap * kStageBytes);
      cp_async_commit();
    }
    sync_threads();  // the vectors

    DCX_NO_UNROLL
    for (int tile = static_cast<int>(block_x()); tile < p.tiles; tile += p.blocks) {
      const Where at = place(p, tile);
      if (at.begin >= at.out_valid) {
        store_rows(p, at, own, rows);
        continue;
      }
      load_rows(p, at, own, at.begin - static_cast<int>(p.pad_left), count, rows);
      cp_async_commit();
      if constexpr (!kResident)
        for (int which = 0; which < kStages - 2; ++which) fill(which);
      cp_async_wait<kResident ? 0 : kStages - 2>();
      snake_rows(p, own, count, vectors, rows);

      float sums[kColumns / 2];
      if constexpr (kResident) {
        fence_async();
        sync_threads();
        wgmma_fence();
        multiply<kDeep, true>(sums, first, panel_bytes, 0, weights);
        DCX_UNROLL
        for (int tap = 1; tap < kTaps; ++tap)
          multiply<kDeep, false>(sums, moved_within(first, tap * dilation * kPanelRowBytes), panel_bytes, 0,
                                 moved_within(weights, tap * kStageBytes));
        wgmma_commit();
      } else {
        step = stage = 0;
        filled = kRing - 2;
        stream([&](Panel b) { multiply<kStepDeep, true>(sums, first, panel_bytes, 0, b); });
        DCX_UNROLL
        for (int chunk = 1; chunk < kChunks; ++chunk)
          stream([&](Panel b) { multiply<kStepDeep, false>(sums, first, panel_bytes, chunk * kStepDeep, b); });
        DCX_NO_UNROLL
        for (int tap = 1; tap < kTaps; ++tap) {
          const Panel a = moved_within(first, tap * dilation * kPanelRowBytes);
          DCX_UNROLL
          for (int chunk = 0; chunk < kChunks; ++chunk)
            stream([&](Panel b) { multiply<kStepDeep, false>(sums, a, panel_bytes, chunk * kStepDeep, b); });
        }
      }
      wgmma_wait<0>();
      settle(sums);
      sync_threads();  // the rows' memory is free
      load_rows(p, at, own, at.begin + static_cast<int>(p.residual_shift), kTileRows, rows);
      uint32_t hidden[kDeep][4];
      hide(sums, pairs, hidden);
      if constexpr (kResident) {
        cp_async_commit();
        wgmma_fence();
        multiply_hidden(sums, hidden, 0, moved_within(weights, kTaps * kStageBytes));
        wgmma_commit();
      } else {
        DCX_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk)
          stream([&](Panel b) { multiply_hidden(sums, hidden, chunk * kStepDeep, b); });
      }
      wgmma_wait<0>();
      settle(sums);
      cp_async_wait<0>();
      sync_threads();  // the residual is everyone's
      add_residual(p, sums, pairs, rows);
      sync_threads();
      store_rows(p, at, own, rows);
      // The next tile's copies go where this thread alone has just read, or where nobody has since the taps.
    }
    cp_async_wait<0>();
  }
};

}  // namespace dcx
