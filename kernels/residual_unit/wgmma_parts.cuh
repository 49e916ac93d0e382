// What the kernels on Hopper's warpgroup products do around them, for one team of kGroups warpgroups: copying rows,
// Snake, the step from sums to the next operand, the residual, y.
//
// The 1x1's columns stand in an order of their own, so that a thread's sums of a row are channels side by side, and x
// and y go from and to global memory without a way through shared memory: of 32 columns, eight channels per thread; of
// 16 at the end, four.
#pragma once
#include "residual_unit.cuh"
#include "../common/wgmma_registers.cuh"

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
  // A thread moves cells of 16 bytes of one column; where rows are a multiple of 8 apart, their place stays the same,
  // which is worth an eighth of the threads.
  static constexpr int kVector = 8, kVectors = kColumns / kVector;
  static constexpr int kAtMost = kTeamThreads / kVectors;
  static constexpr bool kInBlocks = kVectors == 4 || kVectors == 6;  // see own_cell
  static constexpr int kRowsAtOnce = kInBlocks || kAtMost % 8 * 8 <= kAtMost ? kAtMost / 8 * 8 : kAtMost;
  static_assert(sizeof(T) == 2, "16-bit values");

  static constexpr int kVectorFloats = 8 * kColumns;  // what load_vectors fills

  static int64_t segment(int64_t dilation) {
    return round_up(kTileRows + (kResidualUnitTaps - 1) * dilation, int64_t{8});
  }

  // A tile's place, the same for all threads.
  struct Where {
    int clip, begin, in_valid, out_valid;
  };
  // This thread's cells: its column's place in row `row` and every kRowsAtOnce rows on.
  struct Own {
    int row, vector, panel_bytes, shift, cell, first;  // bytes in a row: first, and moved by the shift
    bool active;
    // The byte where the cell of row r stands: in a panel without a shift, and behind the first panel's start.
    DCX_DEVICE int in_panel(int r) const {
      return r * kPanelRowBytes + (kRowsAtOnce % 8 == 0 ? first : (vector % 8 ^ r % 8) * 16);
    }
    DCX_DEVICE int at(int r) const {
      const int place = kRowsAtOnce % 8 == 0 ? cell : (vector % 8 ^ r % 8) * 16 ^ (vector >= 8 ? shift : 0);
      return vector / 8 * panel_bytes + r * kPanelRowBytes + place;
    }
  };

  // Which cell of a block of rows is a thread's: the cells of eight neighbouring threads, which shared memory serves at
  // once, lie in eight different places of a panel's rows.
  struct Cell {
    int row, vector;
  };
  static DCX_DEVICE Cell own_cell(int thread) {
    if constexpr (kVectors == 4) {
      return Cell{row_of_four_cells(thread), thread % 4};
    } else if constexpr (kVectors == 6) {  // four even or odd rows of a block of eight make three times eight
      const int block = thread / 48, at = thread % 24 / 6, vector = thread % 6 + (at == 1 ? 4 : 0);
      return Cell{block * 8 + at * 2 + thread % 48 / 24, vector < 6 ? vector : vector - 6};
    } else {
      return Cell{thread / kVectors, thread % kVectors};
    }
  }
  static DCX_DEVICE Own own_cells(int panel_bytes, int shift) {
    const auto [row, vector] = own_cell(thread_index() % kTeamThreads);
    const int first = (vector % 8 ^ row % 8) * 16;
    return Own{row, vector, panel_bytes, shift, first ^ (vector >= 8 ? shift : 0), first, row < kRowsAtOnce};
  }

  // Which tile: a tile's number is divided once, behind that the next ones' clip and place are counted on.
  struct Turn {
    int clip, tile;
    DCX_DEVICE bool there(const Params& p) const { return clip < p.clips; }
    DCX_DEVICE Turn next(const Params& p) const {
      const int per_clip = static_cast<int>(p.row_tiles), at = tile + p.step_tiles, over = at >= per_clip ? 1 : 0;
      return Turn{clip + p.step_clips + over, at - over * per_clip};
    }
  };
  static DCX_DEVICE Turn first_turn(const Params& p, int team) {
    const int per_clip = static_cast<int>(p.row_tiles), tile = static_cast<int>(block_x()) * kTeams + team;
    return Turn{tile / per_clip, tile % per_clip};
  }

  static DCX_DEVICE Where place(const Params& p, Turn turn) {
    Where at{turn.clip, turn.tile * kTileRows, static_cast<int>(p.in_steps), static_cast<int>(p.out_steps)};
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

  // Where the small vectors have channel c's alpha; its inverse lies kColumns behind. The first four channels of all
  // cells stand side by side, and then the others, so that neighbouring threads read neighbours.
  static DCX_DEVICE int place_of_alpha(int c) { return c % 8 / 4 * (kColumns / 2) + c / 8 * 4 + c % 4; }

  // The alphas of a cell's channels and their inverses; `vector`: which cell of a row.
  struct Alpha {
    float alpha[kVector], inverse[kVector];
  };
  static DCX_DEVICE Alpha load_alpha(const float* vectors, int vector) {
    Alpha of;
    DCX_UNROLL
    for (int i = 0; i < kVector; i += 4) {
      const float* at = vectors + place_of_alpha(vector * kVector + i);
      const auto a = *reinterpret_cast<const Vector16<float>*>(at);
      const auto b = *reinterpret_cast<const Vector16<float>*>(at + kColumns);
      DCX_UNROLL
      for (int j = 0; j < 4; ++j) {
        of.alpha[i + j] = a.values[j];
        of.inverse[i + j] = b.values[j];
      }
    }
    return of;
  }

  // Snake on a cell, in place.
  static DCX_DEVICE void snake_cell(const Alpha& of, unsigned char* at) {
    auto words = *reinterpret_cast<const Vector16<uint32_t>*>(at);
    DCX_UNROLL
    for (int i = 0; i < kVector; i += 2) {
      const Pair<float> x = unpack_pair<T>(words.values[i / 2]);
      words.values[i / 2] = pack_pair<T>(snake_as<T>(x.low, of.alpha[i], of.inverse[i]),
                                         snake_as<T>(x.high, of.alpha[i + 1], of.inverse[i + 1]));
    }
    *reinterpret_cast<Vector16<uint32_t>*>(at) = words;
  }

  // The same on all cells that this thread has copied.
  static DCX_DEVICE void snake_rows(const Own& own, int count, const float* vectors, unsigned char* rows) {
    if (!own.active) return;
    const Alpha of = load_alpha(vectors, own.vector);
    for (int row = own.row; row < count; row += kRowsAtOnce) snake_cell(of, rows + own.at(row));
  }

  // Where the 1x1 has the two channels of a word, in words.
  static DCX_DEVICE int place_of_word(int word) {
    const int within = word % 16;
    if (word < kColumns / 32 * 16) return word - within + within % 4 * 4 + within / 4;
    return word - within + within % 2 * 4 + within / 2;
  }

  // kRows channels of the 1x1's weights from `within` on, zeros where they end; at(k, word): where a word of row k
  // stands.
  template <int kRows, class At>
  static DCX_DEVICE void load_pointwise(const Params& p, int within, const At& at) {
    constexpr int kWarps = kTeams * kTeamThreads / kWarp;
    const int wide = static_cast<int>(p.columns_padded), deep = static_cast<int>(p.channels_padded);
    const T* weight = static_cast<const T*>(p.weight);
    const int lane = thread_index() % kWarp;
    DCX_UNROLL
    for (int first = 0; first < kColumns / 2; first += kWarp) {
      const int word = first + lane, place = place_of_word(word);
      if (word >= kColumns / 2) break;
      DCX_NO_UNROLL
      for (int k = thread_index() / kWarp; k < kRows; k += kWarps) {
        const bool valid = word * 2 < wide && within + k < deep;
        cp_async4(at(k, place), valid ? weight + (kTaps * deep + within + k) * wide + word * 2 : weight, valid);
      }
    }
  }

  // The small vectors: alpha1, its inverse, as place_of_alpha has them; then per pair of columns bias1, alpha2, its
  // inverse, and bias2 of the 1x1's pair there, so that a thread reads a pair's with two loads; behind these out_alpha
  // and its inverse of such a pair. Zeros past the channels.
  static DCX_DEVICE void load_vectors(const Params& p, float* to, int threads) {
    for (int c = thread_index(); c < kColumns; c += threads) {
      const bool valid = c < p.channels;
      const float alpha1 = valid ? p.alpha1[c] : 0.0f, alpha2 = valid ? p.alpha2[c] : 0.0f;
      to[place_of_alpha(c)] = alpha1;
      to[kColumns + place_of_alpha(c)] = valid ? snake_inverse(alpha1) : 0.0f;
      float* pair = to + 2 * kColumns + c / 2 * 8 + c % 2;
      pair[0] = valid && p.bias1 != nullptr ? p.bias1[c] : 0.0f;
      pair[2] = alpha2;
      pair[4] = valid ? snake_inverse(alpha2) : 0.0f;
      to[2 * kColumns + place_of_word(c / 2) * 8 + 6 + c % 2] = valid && p.bias2 != nullptr ? p.bias2[c] : 0.0f;
      if (p.out_alpha == nullptr) continue;
      const float out_alpha = valid ? p.out_alpha[c] : 0.0f;
      float* out = to + 6 * kColumns + place_of_word(c / 2) * 4 + c % 2;
      out[0] = out_alpha;
      out[2] = valid ? snake_inverse(out_alpha) : 0.0f;
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
      const Panel a = moved(rows, k / 4 * panel_bytes + k % 4 * 32 + (k >= 4 ? shift : 0));
      const Panel b = moved(weights, i * 2048);
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
        wgmma_hidden<T, kCount, false>(sums, hidden[first + i], moved(weights, i * 2048));
      else
        wgmma_hidden<T, kCount, true>(sums, hidden[first + i], moved(weights, i * 2048));
    }
  }

  // + bias1, Snake and rounding of two columns' sums; low: bias1 and alpha2, each of both.
  static DCX_DEVICE uint32_t hidden_word(const float* sum, const Vector16<float>& low, const Pair<float>& inverse) {
    return pack_pair<T>(snake_as<T>(sum[0] + low.values[0], low.values[2], inverse.low),
                        snake_as<T>(sum[1] + low.values[1], low.values[3], inverse.high));
  }

  // The same of all; the sums of 16 columns become an operand of the 1x1.
  static DCX_DEVICE void hide(const float (&sums)[kColumns / 2], const float* pairs, uint32_t (&hidden)[kDeep][4]) {
    const float* own = pairs + thread_index() % 4 * 8;
    DCX_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      // Or so many columns' vectors are read ahead that others spill.
      if (kColumns > 96 && n % (kColumns > 128 ? 4 : 1) == 0) sync_warp();
      const auto low = *reinterpret_cast<const Vector16<float>*>(own + n * 32);
      const auto inverse = *reinterpret_cast<const Pair<float>*>(own + n * 32 + 4);
      DCX_UNROLL
      for (int half = 0; half < 2; ++half)
        hidden[n / 2][n % 2 * 2 + half] = hidden_word(sums + n * 4 + half * 2, low, inverse);
    }
  }

  // This thread's first row of the tile; the second is 8 behind.
  static DCX_DEVICE int own_row() { return thread_index() % kTeamThreads / kWarp * 16 + thread_index() % kWarp / 4; }
  struct alignas(8) Half16 {
    uint32_t values[2];
  };

  // Calls move(word, channel, Vector16 or Half16) for this thread's channels of kCount columns from `first` on; `word`
  // counts its words of a row.
  template <int kCount, class Move>
  static DCX_DEVICE void own_channels(int first, const Move& move) {
    const int quarter = thread_index() % 4;
    DCX_UNROLL
    for (int i = 0; i < kCount / 32; ++i) move(i * 4, first + i * 32 + quarter * 8, Vector16<uint32_t>{});
    if constexpr (kCount % 32 != 0) move(kCount / 32 * 4, first + kCount / 32 * 32 + quarter * 4, Half16{});
  }

  // x where the residual is, of this thread's two rows, zeros outside [0, in_valid).
  template <int kCount>
  static DCX_DEVICE void load_residual(const Params& p, const Where& at, int first, uint32_t (&words)[2][kCount / 8]) {
    const int channels = static_cast<int>(p.channels);
    const int t = at.begin + own_row() + static_cast<int>(p.residual_shift);
    const T* x = static_cast<const T*>(p.x.data) + at.clip * p.x.stride_b + t * p.x.stride_t;
    DCX_UNROLL
    for (int half = 0; half < 2; ++half) {
      const bool valid = static_cast<unsigned>(t + half * 8) < static_cast<unsigned>(at.in_valid);
      const T* from = x + half * 8 * p.x.stride_t;
      own_channels<kCount>(first, [&](int word, int channel, auto values) {
        if (valid && channel < channels) values = *reinterpret_cast<const decltype(values)*>(from + channel);
        DCX_UNROLL
        for (int i = 0; i < static_cast<int>(sizeof(values) / 4); ++i) words[half][word + i] = values.values[i];
      });
    }
  }

  // y of this thread's two rows, + bias2 + the residual, and Snake where there is one: kCount columns from `first` on,
  // zeros from out_valid on.
  template <int kCount>
  static DCX_DEVICE void finish(const Params& p, const Where& at, int first, const float* sums, const float* pairs,
                                const uint32_t (&words)[2][kCount / 8]) {
    const float* own = pairs + first * 4 + thread_index() % 4 * 8 + 6;
    const float* out = pairs + 4 * kColumns + first * 2 + thread_index() % 4 * 4;
    const int t = at.begin + own_row(), channels = static_cast<int>(p.channels);
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + at.clip * p.y.stride_b + t * p.y.stride_t;
    own_channels<kCount>(first, [&](int word, int channel, auto values) {
      constexpr int kWords = static_cast<int>(sizeof(values) / 4);
      Pair<float> bias[kWords];
      DCX_UNROLL
      for (int i = 0; i < kWords; ++i) bias[i] = *reinterpret_cast<const Pair<float>*>(own + (word + i) * 32);
      DCX_UNROLL
      for (int half = 0; half < 2; ++half) {
        DCX_UNROLL
        for (int i = 0; i < kWords; ++i) {
          const Pair<float> old = unpack_pair<T>(words[half][word + i]);
          const float* sum = sums + (word + i) * 4 + half * 2;
          const uint32_t both = pack_pair<T>(sum[0] + bias[i].low + old.low, sum[1] + bias[i].high + old.high);
          values.values[i] = t + half * 8 < at.out_valid ? both : 0;
        }
        if (p.out_alpha != nullptr) {
          DCX_UNROLL
          for (int i = 0; i < kWords; ++i) {
            if (kColumns > 64) sync_warp();  // or more are read ahead than there is room for
            const auto snake = *reinterpret_cast<const Vector16<float>*>(out + (word + i) * 16);
            const Pair<float> x = unpack_pair<T>(values.values[i]);
            values.values[i] = pack_pair<T>(snake_as<T>(x.low, snake.values[0], snake.values[2]),
                                            snake_as<T>(x.high, snake.values[1], snake.values[3]));
          }
        }
        if (t + half * 8 < p.out_steps && channel < channels)
          *reinterpret_cast<decltype(values)*>(y + half * 8 * p.y.stride_t + channel) = values;
      }
    });
  }

  // Both, in parts where registers are short.
  template <int kFirst, int kCount>
  static DCX_DEVICE void finish_late(const Params& p, const Where& at, const float* sums, const float* pairs) {
    constexpr int kPart = kCount < 64 ? kCount : 64;
    uint32_t words[2][kPart / 8];
    load_residual<kPart>(p, at, kFirst, words);
    finish<kPart>(p, at, kFirst, sums, pairs, words);
    if constexpr (kCount > kPart) {
      sync_warp();  // or the next part's loads come forward
      finish_late<kFirst + kPart, kCount - kPart>(p, at, sums + kPart / 2, pairs);
    }
  }

  // Zeros: a tile of y past out_valid.
  static DCX_DEVICE void clear_rows(const Params& p, const Where& at, const Own& own) {
    if (!own.active || own.vector * kVector >= p.channels) return;
    T* to = static_cast<T*>(const_cast<void*>(p.y.data)) + at.clip * p.y.stride_b +
            (at.begin + own.row) * p.y.stride_t + own.vector * kVector;
    const int count = minimum(kTileRows, static_cast<int>(p.out_steps) - at.begin);
    DCX_NO_UNROLL
    for (int row = own.row; row < count; row += kRowsAtOnce, to += kRowsAtOnce * p.y.stride_t)
      *reinterpret_cast<Vector16<uint32_t>*>(to) = Vector16<uint32_t>{};
  }
};

}  // namespace dcx
