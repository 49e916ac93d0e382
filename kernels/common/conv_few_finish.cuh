// conv_finish.cuh's way from sums to y, bit for bit, for conv_few.cuh: all that does not depend on the kernel in front
// is there before it ends.
#pragma once
#include "conv_finish.cuh"

namespace dcx {

template <class T, int kTileColumns, int kThreads, int kSumLd>
struct FewFinish {
  static constexpr int kPairs = kTileColumns / 2, kPasses = 2, kRowsAtOnce = kThreads / kPairs, kMostRanges = 8;
  static constexpr int kMostRows = kPasses * kRowsAtOnce;  // that a tile may have

  using Params = ConvGemmParams;

  // In shared memory; of Snake on what is written.
  struct Vectors {
    float bias[kTileColumns], alpha[kTileColumns], inverse[kTileColumns];
  };

  // What a thread finishes: two columns, and kPasses rows of them.
  struct Share {
    int flags;
    T* to[kPasses];              // null: no row
    const T* residual[kPasses];  // null: nothing to add
    uint32_t more[kPasses];
  };
  // A share's flags: the row of pass i lies within its clip, else it becomes zeros; it has a residual; both columns are
  // there.
  static constexpr int kCounts = 1, kAdds = 1 << kPasses, kBoth = 1 << 2 * kPasses;
  static DCX_DEVICE Share share_of(const Params& p, const ConvPlace& at) {
    Share own;
    const int wide = static_cast<int>(at.column) + thread_index() % kPairs * 2;
    const int columns = static_cast<int>(p.step_columns), beside = p.phases.stride > 0 ? wide / columns : 0;
    const int column = wide - beside * columns, stride = p.phases.stride > 0 ? static_cast<int>(p.phases.stride) : 1;
    own.flags = columns - column > 1 ? kBoth : 0;
    const int own_rows = static_cast<int>(p.tile_rows), tile_rows = own_rows * static_cast<int>(p.tile_items);
    DCX_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      const int row = thread_index() / kPairs + i * kRowsAtOnce, item = p.tile_items == 1 ? 0 : row / own_rows;
      const int within = static_cast<int>(at.row) + row - item * own_rows;
      const int64_t b = at.clip + item, t = int64_t{within} * stride + at.phase + beside;
      const bool there = wide < at.columns && row < tile_rows && b < p.batch && within < p.rows && t < p.out_steps;
      own.to[i] = nullptr;
      own.residual[i] = nullptr;
      own.more[i] = 0;
      if (!there) continue;
      const bool counts = t < conv_out_valid(p, b);
      if (counts) own.flags |= kCounts << i;
      own.to[i] =
          static_cast<T*>(const_cast<void*>(p.y.data)) + b * p.y.stride_b + t * p.y.stride_t + column * p.y.stride_c;
      const int64_t source = t + p.residual_shift;
      if (p.residual.data != nullptr && counts &&
          (p.residual_valid == 0 || (source >= 0 && source < conv_in_valid(p, b)))) {
        own.flags |= kAdds << i;
        own.residual[i] = static_cast<const T*>(p.residual.data) + b * p.residual.stride_b +
                          source * p.residual.stride_t + column * p.residual.stride_c;
      }
    }
    return own;
  }
  static DCX_DEVICE void fill_vectors(const Params& p, const ConvPlace& at, Vectors& to) {
    const int i = thread_index(), columns = static_cast<int>(p.step_columns);
    if (i >= kTileColumns) return;
    const int wide = static_cast<int>(at.column) + i, column = p.phases.stride > 0 ? wide % columns : wide;
    const float* snake = p.out_alpha != nullptr ? p.out_alpha : p.after_alpha;
    const bool there = wide < at.columns;
    to.bias[i] = there && p.bias != nullptr ? p.bias[column] : 0.0f;
    to.alpha[i] = there && snake != nullptr ? snake[column] : 0.0f;
    to.inverse[i] = snake_inverse(to.alpha[i]);
  }
  static DCX_DEVICE void load_residual(const Params& p, Share& own) {
    DCX_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      if ((own.flags & kAdds << i) == 0) continue;
      if (p.vector_residual) {
        own.more[i] = *reinterpret_cast<const uint32_t*>(own.residual[i]);
      } else {
        own.more[i] = own.residual[i][0].bits;
        if ((own.flags & kBoth) != 0)
          own.more[i] |= static_cast<uint32_t>(own.residual[i][p.residual.stride_c].bits) << 16;
      }
    }
  }
  // Adds up the ranges of the rows' sums, in order, and brings them to y.
  static DCX_DEVICE void run(const Params& p, const Share& own, const float* sums, int range_floats,
                             const Vectors& vectors) {
    struct alignas(8) Two {
      float values[2];
    };
    const auto two = [](const float* from) { return *reinterpret_cast<const Two*>(from); };
    const int column = thread_index() % kPairs * 2;
    const Two bias = two(vectors.bias + column), alpha = two(vectors.alpha + column);
    const Two inverse = two(vectors.inverse + column);
    sums += thread_index() / kPairs * kSumLd + column;
    DCX_NO_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, sums += kRowsAtOnce * kSumLd) {
      T* to = pass == 0 ? own.to[0] : own.to[1];
      if (to == nullptr) continue;
      Two parts[kMostRanges];
      DCX_UNROLL
      for (int range = 0; range < kMostRanges; ++range)
        if (range < p.ranges) parts[range] = two(sums + range * range_floats);
      float values[2] = {0.0f, 0.0f};
      DCX_UNROLL
      for (int range = 0; range < kMostRanges; ++range) {
        if (range < p.ranges) {
          values[0] += parts[range].values[0];
          values[1] += parts[range].values[1];
        }
      }
      values[0] += bias.values[0];
      values[1] += bias.values[1];
      if (p.activation != Activation::kNone) {
        values[0] = finish_activation(values[0], p.activation);
        values[1] = finish_activation(values[1], p.activation);
      }
      if (p.out_alpha != nullptr) {
        values[0] = snake_as<T>(values[0], alpha.values[0], inverse.values[0]);
        values[1] = snake_as<T>(values[1], alpha.values[1], inverse.values[1]);
      }
      if ((own.flags & kAdds << pass) != 0) {
        const uint32_t more = pass == 0 ? own.more[0] : own.more[1];
        const Vector16<uint32_t> words{{more, 0, 0, 0}};
        values[0] += value_of<T>(words, 0);
        values[1] += value_of<T>(words, 1);
      }
      const bool counts = (own.flags & kCounts << pass) != 0, both = (own.flags & kBoth) != 0;
      uint32_t out = pack_pair<T>(values[0], values[1]);
      if (p.after_alpha != nullptr) {
        if (p.snaked != 0) store(p, counts ? out : 0, both, to);
        const Vector16<uint32_t> words{{out, 0, 0, 0}};
        out = pack_pair<T>(snake_as<T>(value_of<T>(words, 0), alpha.values[0], inverse.values[0]),
                           snake_as<T>(value_of<T>(words, 1), alpha.values[1], inverse.values[1]));
      }
      store(p, counts ? out : 0, both, snaked_of(p, to));
    }
  }

 private:
  static DCX_DEVICE void store(const Params& p, uint32_t out, bool both, T* to) {
    if (p.vector_store) {
      *reinterpret_cast<uint32_t*>(to) = out;
    } else {
      to[0] = T{static_cast<uint16_t>(out)};
      if (both) to[p.y.stride_c] = T{static_cast<uint16_t>(out >> 16)};
    }
  }
};

}  // namespace dcx
