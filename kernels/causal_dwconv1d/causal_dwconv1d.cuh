// h[t, c] = bias[c] + sum_k weight[c, k] x[t - left + k, c], then LayerNorm over c of h where asked for. A block owns
// p.tile_rows steps of one clip and all channels, kRows steps at a time; a thread owns pairs of neighbouring channels
// and slides down the taps with kRows + kAtOnce - 1 input rows in registers. Rows of h stand in shared memory as floats
// for a warp per row to take mean and variance. float32 sums: taps in rising order, channels in an order that C alone
// decides. Pairs are moved at once where the layout allows (Params::x_pairs, y_pairs), weights 16 bytes at a time.
#pragma once
#include <math.h>

#include "../common/conv_shape.h"
#include "../common/launch.cuh"
#include "params.h"

namespace dcx {

// Two neighbours, moved at once.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T values[2];
};

struct DwconvParams {
  CausalDwconv1dParams op;
  int64_t tile_rows;  // of a block, a multiple of the kernel's kRows
  int64_t row_tiles;  // per clip
  int row_pitch;      // floats from one row of h to the next; 0: no rows are kept
  int slab;           // channels of one pass over the threads, a multiple of 4
  int passes;
  bool resident;  // a block copies all weights once; else each pass copies its own
  bool copies;    // weights are copied 16 bytes at a time
  bool x_pairs, y_pairs;
};

template <class T, int kRowsAtOnce>
struct Dwconv {
  using Params = DwconvParams;
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = kRowsAtOnce > 1 && kCompiledFor != 86 && kCompiledFor != 89 ? 2 : 1;
  static constexpr bool kNeedsSm80 = false, kWaitsItself = true;
  static constexpr int kRows = kRowsAtOnce;
  static constexpr int kAtOnce = kRows > 1 ? 4 : 8;  // taps; a larger window would spill
  static constexpr int kWindow = kRows + kAtOnce - 1;
  static constexpr int kStatistics = (2 * kRows + 3) / 4 * 4;  // floats: mean and 1 / deviation of each row

  static int64_t smem_bytes(const Params& p) {
    const int64_t weights = (p.resident ? p.op.channels : p.slab) * p.op.taps;
    return (kRows * int64_t{p.row_pitch} + kStatistics + weights) * static_cast<int64_t>(sizeof(float));
  }

  static DCX_DEVICE int64_t clamp(int64_t value, int64_t most) { return maximum(int64_t{0}, minimum(value, most)); }

  static DCX_DEVICE void copy_weights(const Params& p, int64_t first, int64_t count, float* to) {
    const float* from = static_cast<const float*>(p.op.weight) + first;
    const int64_t whole = p.copies ? count / 4 * 4 : 0;
    for (int64_t i = int64_t{thread_index()} * 4; i < whole; i += kThreads * 4) cp_async16(to + i, from + i, true);
    for (int64_t i = whole + thread_index(); i < count; i += kThreads) to[i] = from[i];
    cp_async_commit();
  }

  // Channels c and c + 1 at one step, zeros where it is none of the clip's.
  static DCX_DEVICE void load(const Params& p, const T* at, bool valid, bool both, float (&to)[2]) {
    to[0] = to[1] = 0.0f;
    if (!valid) return;
    if (p.x_pairs) {
      const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(at);
      to[0] = to_float(pair.values[0]);
      to[1] = to_float(pair.values[1]);
    } else {
      to[0] = to_float(at[0]);
      if (both) to[1] = to_float(at[p.op.x.stride_c]);
    }
  }

  static DCX_DEVICE void store(const Params& p, T* at, bool both, float first, float second) {
    if (p.y_pairs) {
      *reinterpret_cast<Pair<T>*>(at) = Pair<T>{{from_float<T>(first), from_float<T>(second)}};
    } else {
      at[0] = from_float<T>(first);
      if (both) at[p.op.y.stride_c] = from_float<T>(second);
    }
  }

  // A warp per row: the mean, then the variance of what is left, since squares less the squared mean would cancel.
  static DCX_DEVICE void take_statistics(const Params& p, const float* rows, float* statistics) {
    const int lane = thread_index() % kWarp;
    const int channels = static_cast<int>(p.op.channels);
    for (int r = thread_index() / kWarp; r < kRows; r += kThreads / kWarp) {
      const float* row = rows + r * p.row_pitch;
      float mean = 0.0f, scale = 0.0f;
      DCX_NO_UNROLL
      for (int pass = 0; pass < 2; ++pass) {
        float sum = 0.0f;
        for (int c = lane * 4; c < channels; c += kWarp * 4) {
          const auto four = *reinterpret_cast<const Vector16<float>*>(row + c);
          DCX_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (c + i >= channels) continue;
            const float d = four.values[i] - mean;
            sum += pass == 0 ? d : d * d;
          }
        }
        DCX_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        sum /= static_cast<float>(channels);
        if (pass == 0)
          mean = sum;
        else
          scale = 1.0f / sqrtf(sum + static_cast<float>(p.op.eps));
      }
      if (lane == 0) {
        statistics[2 * r] = mean;
        statistics[2 * r + 1] = scale;
      }
    }
  }

  // Where a thread stands in one pass: channels c and c + 1.
  struct Own {
    int in_pass, channel;
    bool active, both;
  };
  static DCX_DEVICE Own own(const Params& p, int pass) {
    Own at;
    at.in_pass = thread_index() * 2;
    at.channel = pass * p.slab + at.in_pass;
    at.active = at.in_pass < p.slab && at.channel < p.op.channels;
    at.both = at.channel + 1 < p.op.channels;
    return at;
  }

  // Slides down the taps; `from` is the first row of the window, of which rows begin .. end are the clip's.
  static DCX_DEVICE void convolve(const Params& p, const Own& at, const float* weights, const T* from, int begin,
                                  int end, float (&window)[kWindow][2], float (&sums)[kRows][2]) {
    const int taps = static_cast<int>(p.op.taps);
    // With an odd K, the lanes of a half warp read weights from every second bank: the halves take turns.
    const bool swap = at.both && thread_index() % kWarp >= 16;
    const float* early = weights + (at.in_pass + (swap ? 1 : 0)) * taps;
    const float* late = weights + (at.in_pass + (at.both && !swap ? 1 : 0)) * taps;
    DCX_NO_UNROLL
    for (int k0 = 0; k0 < taps; k0 += kAtOnce) {
      if (k0 > 0) {
        from += kAtOnce * p.op.x.stride_t;
        DCX_UNROLL
        for (int i = 0; i < kRows - 1; ++i) {
          window[i][0] = window[i + kAtOnce][0];
          window[i][1] = window[i + kAtOnce][1];
        }
        DCX_UNROLL
        for (int i = kRows - 1; i < kWindow; ++i)
          load(p, from + i * p.op.x.stride_t, k0 + i >= begin && k0 + i < end, at.both, window[i]);
      }
      DCX_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        if (k0 + u >= taps) break;
        const float one = early[k0 + u], other = late[k0 + u];
        const float w0 = swap ? other : one, w1 = swap ? one : other;
        DCX_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sums[r][0] = fused_multiply_add(window[r + u][0], w0, sums[r][0]);
          sums[r][1] = fused_multiply_add(window[r + u][1], w1, sums[r][1]);
        }
      }
    }
  }

  // A vector of two channels, zeros where there is none.
  static DCX_DEVICE Pair<float> vector_at(const void* vector, const Own& at) {
    if (vector == nullptr || !at.active) return Pair<float>{};
    const float* from = static_cast<const float*>(vector) + at.channel;
    return Pair<float>{{from[0], at.both ? from[1] : 0.0f}};
  }
  // LayerNorm's vectors.
  struct Norm {
    Pair<float> scale, shift;
  };
  static DCX_DEVICE Norm norm_at(const Params& p, const Own& at) {
    return Norm{vector_at(p.op.ln_weight, at), vector_at(p.op.ln_bias, at)};
  }

  // Calls all that depends on the layer alone to L2, while the kernel in front runs.
  static DCX_DEVICE void fetch_ahead(const Params& p) {
    constexpr int64_t kLine = 32;  // floats
    const auto fetch = [](const void* vector, int64_t count) {
      if (vector == nullptr) return;
      for (int64_t i = thread_index() * kLine; i < count; i += kThreads * kLine)
        prefetch_l2(static_cast<const float*>(vector) + i);
    };
    fetch(p.op.weight, p.op.channels * p.op.taps);
    fetch(p.op.bias, p.op.channels);
    fetch(p.op.ln_weight, p.op.channels);
    fetch(p.op.ln_bias, p.op.channels);
  }

  static DCX_DEVICE void normalise(const Params& p, const Own& at, const Norm& norm, const float* rows,
                                   const float* statistics, T* to, int count, int valid) {
    DCX_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) break;
      const auto h = *reinterpret_cast<const Pair<float>*>(rows + r * p.row_pitch + at.channel);
      const float mean = statistics[2 * r], scale = statistics[2 * r + 1];
      store(p, to + r * p.op.y.stride_t, at.both,
            r < valid ? fused_multiply_add((h.values[0] - mean) * scale, norm.scale.values[0], norm.shift.values[0])
                      : 0.0f,
            r < valid ? fused_multiply_add((h.values[1] - mean) * scale, norm.scale.values[1], norm.shift.values[1])
                      : 0.0f);
    }
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    const CausalDwconv1dParams& op = p.op;
    float* rows = reinterpret_cast<float*>(smem);
    float* statistics = rows + kRows * p.row_pitch;
    float* weights = statistics + kStatistics;
    const int64_t b = block_x() / p.row_tiles, begin = block_x() % p.row_tiles * p.tile_rows;
    const int64_t end = minimum(begin + p.tile_rows, op.out_steps);
    const bool norm = op.ln_weight != nullptr;
    if (!op.weights_stand) {
      fetch_ahead(p);
      grid_wait();
    }
    if (p.resident) copy_weights(p, 0, op.channels * op.taps, weights);
    // Of the few rows of a streamed frame every way to memory counts: these are gone beside the others.
    const Pair<float> early_bias = kRows == 1 ? vector_at(op.bias, own(p, 0)) : Pair<float>{};
    const Norm early_norm = kRows == 1 && norm ? norm_at(p, own(p, 0)) : Norm{};
    if (op.weights_stand) grid_wait();
    const int64_t in_valid =
        op.lengths != nullptr ? maximum(int64_t{0}, minimum(op.lengths[b], op.in_steps)) : op.in_steps;
    const int64_t out_valid =
        op.lengths != nullptr ? conv_output_steps(in_valid, op.taps, 1, 1, op.pad_left, op.pad_right) : op.out_steps;

    DCX_NO_UNROLL
    for (int64_t t0 = begin; t0 < end; t0 += kRows) {
      const T* x = static_cast<const T*>(op.x.data) + b * op.x.stride_b + (t0 - op.pad_left) * op.x.stride_t;
      T* y = static_cast<T*>(op.y.data) + b * op.y.stride_b + t0 * op.y.stride_t;
      const int reach = kRows - 1 + static_cast<int>(op.taps);
      const int first = static_cast<int>(clamp(op.pad_left - t0, reach));
      const int last = static_cast<int>(clamp(in_valid + op.pad_left - t0, reach));
      const int count = static_cast<int>(clamp(end - t0, kRows)),
                valid = static_cast<int>(clamp(out_valid - t0, kRows));
      DCX_NO_UNROLL
      for (int pass = 0; pass < p.passes; ++pass) {
        const Own at = own(p, pass);
        const T* from = x + at.channel * op.x.stride_c;
        float window[kWindow][2], sums[kRows][2];
        DCX_UNROLL
        for (int i = 0; i < kWindow; ++i)
          load(p, from + i * op.x.stride_t, at.active && i >= first && i < last, at.both, window[i]);
        if (!p.resident) {
          sync_threads();  // the pass before has read its weights
          const int64_t c0 = int64_t{pass} * p.slab;
          copy_weights(p, c0 * op.taps, minimum(int64_t{p.slab}, op.channels - c0) * op.taps, weights);
        }
        if (!p.resident || (t0 == begin && pass == 0)) {
          cp_async_wait<0>();
          sync_threads();
        }
        if (!at.active) continue;
        const Pair<float> bias = kRows == 1 && pass == 0 ? early_bias : vector_at(op.bias, at);
        DCX_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sums[r][0] = bias.values[0];
          sums[r][1] = bias.values[1];
        }
        convolve(p, at, p.resident ? weights + pass * p.slab * op.taps : weights, from, first, last, window, sums);
        DCX_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (norm)
            *reinterpret_cast<Pair<float>*>(rows + r * p.row_pitch + at.channel) =
                Pair<float>{{sums[r][0], sums[r][1]}};
          else if (r < count)
            store(p, y + at.channel * op.y.stride_c + r * op.y.stride_t, at.both, r < valid ? sums[r][0] : 0.0f,
                  r < valid ? sums[r][1] : 0.0f);
        }
      }
      if (!norm) continue;
      sync_threads();
      take_statistics(p, rows, statistics);
      sync_threads();
      DCX_NO_UNROLL
      for (int pass = 0; pass < p.passes; ++pass) {
        const Own at = own(p, pass);
        if (at.active)
          normalise(p, at, kRows == 1 && pass == 0 ? early_norm : norm_at(p, at), rows, statistics,
                    y + at.channel * op.y.stride_c, count, valid);
      }
      // The next rows of h overwrite what their own thread alone has read since; the statistics follow a barrier.
    }
  }
};

// Lays the kernel over the problem; false where a row does not fit shared memory.
template <class K>
bool fit_dwconv(const CudaContext& context, DwconvParams& p) {
  const CausalDwconv1dParams& op = p.op;
  const int64_t most_floats = context.shared_bytes / static_cast<int64_t>(sizeof(float));
  if (op.ln_weight != nullptr && op.channels > most_floats) return false;
  p.row_pitch = op.ln_weight != nullptr ? static_cast<int>(round_up(op.channels, 4)) : 0;
  p.slab = static_cast<int>(minimum(int64_t{2 * K::kThreads}, round_up(op.channels, 4)));
  p.resident = true;
  if (K::smem_bytes(p) > context.shared_bytes) {
    p.resident = false;
    while (p.slab > 4 && K::smem_bytes(p) > context.shared_bytes) p.slab = static_cast<int>(round_up(p.slab / 2, 4));
  }
  p.passes = static_cast<int>(ceil_div(op.channels, p.slab));
  return K::smem_bytes(p) <= context.shared_bytes;
}

template <class K>
bool start_dwconv(const CudaContext& context, DwconvParams& p) {
  if (!fit_dwconv<K>(context, p)) return false;
  const int64_t units = p.op.batch * ceil_div(p.op.out_steps, int64_t{K::kRows});
  const int64_t slots = context.multiprocessors * minimum(int64_t{2}, context.shared_bytes / K::smem_bytes(p));
  // Two waves of blocks: enough to even out, few enough that copying the weights is a small part.
  const int64_t each = minimum(maximum(int64_t{1}, units / (2 * slots)), ceil_div(p.op.out_steps, int64_t{K::kRows}));
  p.tile_rows = each * K::kRows;
  p.row_tiles = ceil_div(p.op.out_steps, p.tile_rows);
  launch<K>(context, p, Grid{p.op.batch * p.row_tiles, 1, 1}, K::smem_bytes(p));
  return true;
}

// One row at a time where eight would leave most multiprocessors idle; results do not depend on it.
template <class T>
bool choose_dwconv(const CudaContext& context, DwconvParams& p) {
  const int64_t rows = p.op.batch * p.op.out_steps;
  if (rows > 2 * context.multiprocessors && start_dwconv<Dwconv<T, 8>>(context, p)) return true;
  return start_dwconv<Dwconv<T, 1>>(context, p);
}

inline void launch_causal_dwconv1d_of(const CudaContext& context, const CausalDwconv1dParams& op) {
  DwconvParams p{};
  p.op = op;
  const auto paired = [](const TensorView& v) {
    return v.stride_c == 1 && v.stride_t % 2 == 0 && v.stride_b % 2 == 0 &&
           reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(2 * element_size(v.dtype)) == 0;
  };
  p.x_pairs = paired(op.x) && op.channels % 2 == 0;
  p.y_pairs = paired(op.y) && op.channels % 2 == 0;
  p.copies = reinterpret_cast<uintptr_t>(op.weight) % 16 == 0;
  if (op.batch == 0 || op.out_steps == 0) return;
  const bool started = op.x.dtype == DType::kF32    ? choose_dwconv<float>(context, p)
                       : op.x.dtype == DType::kBF16 ? choose_dwconv<bf16>(context, p)
                                                    : choose_dwconv<f16>(context, p);
  if (!started)
    throw std::runtime_error("causal_dwconv1d: a row of " + std::to_string(op.channels) +
                             " channels must fit this GPU's shared memory of " + std::to_string(context.shared_bytes) +
                             " bytes");
}

}  // namespace dcx
