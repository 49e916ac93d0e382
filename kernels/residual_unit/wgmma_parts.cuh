// What the kernels on Hopper's warpgroup products do around them, for one team of kGroups warpgroups: copying rows,
// Snake, the step from sums to the next operand, the residual, y.
#pragma once
#include "residual_unit.cuh"
#include "wgmma_registers.cuh"

namespace dcx {

// The two values of a word.
template <class T>
DCX_DEVICE Pair<float> unpack_pair(uint32_t word) {
#ifdef __CUDACC__
  if constexpr (DTypeOf<T>::value == DType::kBF16)
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
#endif
  return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}

template <class T, int kColumns, int kGroups, int kTeams>
struct WgmmaParts {
  using Params = FusedUnitParams;
  static constexpr int kTeamThreads = 128 * kGroups;
  static constexpr int kTileRows = 64 * kGroups, kTileColumns = kColumns;
  static constexpr int kTaps = static_cast<int>(kResidualUnitTaps);
  static constexpr int kPanels = (kColumns + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kDeep = kColumns / 16;  // products of a tap
  // A thread moves cells of 16 bytes of one column; where rows are a multiple of 8 apart, their place stays the same.
  static constexpr int kVector = 8, kVectors = kColumns / kVector;
  static constexpr int kAtMost = kTeamThreads / kVectors;
  static constexpr int kRowsAtOnce = kAtMost >= 8 ? kAtMost / 8 * 8 : kAtMost;
  static_assert(sizeof(T) == 2, "16-bit values");

  static int64_t segment(int64_t dilation) {
    return round_up(kTileRows + (kResidualUnitTaps - 1) * dilation, int64_t{8});
  }

  // A tile's place, the same for all threads.
  struct Where {
    int clip, begin, in_valid, out_valid;
  };
  // This thread's cells: its column's place in row `row` and every kRowsAtOnce rows on.
  struct Own {
    int row, vector, panel_bytes, cell, first;  // bytes in a row: first, and moved by the shift
    bool active;
    // The byte where the cell of row r stands: in a panel without a shift, and behind the first panel's start.
    DCX_DEVICE int in_panel(int r) const {
      return r * kPanelRowBytes + (kRowsAtOnce % 8 == 0 ? first : (vector % 8 ^ r % 8) * 16);
    }
    DCX_DEVICE int at(int r) const {
      return vector / 8 * panel_bytes +
             (kTeams == 1 ? in_panel(r) : r * kPanelRowBytes + (kRowsAtOnce % 8 == 0 ? cell : 0));
    }
  };

  static DCX_DEVICE Own own_cells(int panel_bytes, int shift) {
    static_assert(kTeams == 1 || kRowsAtOnce % 8 == 0, "cells stay in their place");
    const int thread = thread_index() % kTeamThreads, row = thread / kVectors, vector = thread % kVectors;
    const int first = (vector % 8 ^ row % 8) * 16;
    return Own{row, vector, panel_bytes, first ^ (vector >= 8 ? shift : 0), first, row < kRowsAtOnce};
  }

  static DCX_DEVICE Where place(const Params& p, int tile) {
    const int per_clip = static_cast<int>(p.row_tiles);
    Where at{tile / per_clip, tile % per_clip * kTileRows, static_cast<int>(p.in_steps), static_cast<int>(p.out_steps)};
    if (p.lengths != nullptr) {
      const int64_t valid = maximum(int64_t{0}, minimum(p.lengths[at.clip], p.in_steps));
      at.in_valid = static_cast<int>(valid);
      at.out_valid = static_cast<int>(conv_output_steps(valid, kTaps, 1, p.dilation, p.pad_left, p.pad_right));
    }
    return at;
  }

  // Rows of x from step `begin` on, zero outside [0, in_valid).
  static DCX_DEVICE void load_rows(const Params& p, const Where& at, const Own& own, int begin, int count,
                                   unsigned char* rows) {
    if (!own.active) return;
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b;
    const T* from = x + (begin + own.row) * p.x.stride_t + own.vector * kVector;
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
  static DCX_DEVICE void snake_rows(const Own& own, int count, const float* vectors, unsigned char* rows) {
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
    for (int row = own.row; row < count; row += kRowsAtOnce) {
      unsigned char* at = rows + own.at(row);
      auto words = *reinterpret_cast<const Vector16<uint32_t>*>(at);
      DCX_UNROLL
      for (int i = 0; i < kVector; i += 2) {
        const Pair<float> x = unpack_pair<T>(words.values[i / 2]);
        words.values[i / 2] =
            pack_pair<T>(snake_as<T>(x.low, alpha[i], inverse[i]), snake_as<T>(x.high, alpha[i + 1], inverse[i + 1]));
      }
      *reinterpret_cast<Vector16<uint32_t>*>(at) = words;
    }
  }

  // The small vectors: alpha1, its inverse; then per pair of columns bias1, alpha2, its inverse and bias2, so that a
  // thread reads a pair's with two loads. Zeros past the channels.
  static DCX_DEVICE void load_vectors(const Params& p, float* to, int threads) {
    for (int c = thread_index(); c < kColumns; c += threads) {
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

  // Products of kCount times 16 channels of one tap, from the k-th 16 on; kStarts: the sums' first. `shift`: bytes
  // that columns from 64 on are moved by in their panels.
  template <int kCount, bool kStarts>
  static DCX_DEVICE void multiply(float (&sums)[kColumns / 2], Panel rows, int panel_bytes, int shift, int first,
                                  Panel weights) {
    DCX_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int k = first + i;
      const Panel a = moved_within(rows, k / 4 * panel_bytes + k % 4 * 32 + (k >= 4 ? shift : 0));
      const Panel b = moved_within(weights, i * 2048);
      if (kStarts && i == 0)
        wgmma_rows<T, kColumns, false>(sums, a, b);
      else
        wgmma_rows<T, kColumns, true>(sums, a, b);
    }
  }

  // The 1x1's products for kCount columns, of kDepth times 16 channels from the first-th 16 on.
  template <int kCount, int kDepth>
  static DCX_DEVICE void multiply_hidden(float (&sums)[kCount / 2], const uint32_t (&hidden)[kDeep][4], int first,
                                         Panel weights) {
    DCX_UNROLL
    for (int i = 0; i < kDepth; ++i) {
      if (first + i == 0)
        wgmma_hidden<T, kCount, false>(sums, hidden[first + i], moved_within(weights, i * 2048));
      else
        wgmma_hidden<T, kCount, true>(sums, hidden[first + i], moved_within(weights, i * 2048));
    }
  }

  // + bias1, Snake and rounding; the sums of 16 columns become an operand of the 1x1.
  static DCX_DEVICE void hide(const float (&sums)[kColumns / 2], const float* pairs, uint32_t (&hidden)[kDeep][4]) {
    const float* own = pairs + thread_index() % 4 * 8;
    DCX_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      if (kColumns > 128 && n % 4 == 0) sync_warp();  // or so many columns' vectors are read ahead that others spill
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

  // + bias2 + the residual, rounded, in the residual's place: kCount columns from kFirst on.
  template <int kFirst, int kCount>
  static DCX_DEVICE void add_residual(const float (&sums)[kCount / 2], const float* pairs, unsigned char* rows,
                                      int panel_bytes, int shift) {
    const int lane = thread_index() % kWarp, row = thread_index() % kTeamThreads / kWarp * 16 + lane / 4;
    const float* own = pairs + lane % 4 * 8 + 6;
    const int first = row * kPanelRowBytes + lane / 4 * 16 + lane % 4 * 4;
    constexpr int kAtOnce = 2;  // loads that are under way together
    DCX_UNROLL
    for (int first_n = kFirst / 8; first_n < (kFirst + kCount) / 8; first_n += kAtOnce) {
      const auto at = [&](int n, int half) {
        return reinterpret_cast<uint32_t*>(rows + n / 8 * panel_bytes + (first ^ (n % 8 * 16 + (n >= 8 ? shift : 0))) +
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
          const float* sum = sums + (first_n + i - kFirst / 8) * 4 + half * 2;
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
    const int count = minimum(kTileRows, static_cast<int>(p.out_steps) - at.begin);
    if (p.y.stride_t == kColumns && at.begin + kTileRows <= minimum(at.out_valid, static_cast<int>(p.out_steps))) {
      DCX_UNROLL
      for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
        if (kTileRows % kRowsAtOnce != 0 && i + own.row >= kTileRows) break;
        *reinterpret_cast<Vector16<uint32_t>*>(to + i * kColumns) =
            *reinterpret_cast<const Vector16<uint32_t>*>(rows + own.at(i + own.row));
      }
      return;
    }
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce, to += kRowsAtOnce * p.y.stride_t) {
      Vector16<uint32_t> words{};
      if (at.begin + row < at.out_valid) words = *reinterpret_cast<const Vector16<uint32_t>*>(rows + own.at(row));
      *reinterpret_cast<Vector16<uint32_t>*>(to) = words;
    }
  }
};

}  // namespace dcx
