// y = act(bias + conv(snake(x))) + residual for seven taps, stride 1, dilation 1 and one output: the decoder's last
// convolution, which reads far more than it computes. A thread owns 16 bytes of channels, whose weights it keeps in
// registers, and walks down the rows of a stretch: every value is loaded once and snaked once, and goes into seven
// running sums, of which one is complete at each row. The groups of channels are added in order, through shared memory.
// float32 sums. Rows are loaded 16 bytes at a time where the layout allows it (Params::vectors), else value by value.
#pragma once
#include "../common/conv_finish.cuh"
#include "row_tiles.cuh"

namespace dcx {

struct SlidingConv {
  using Params = ConvGemmParams;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 2;
  static constexpr bool kNeedsSm80 = false, kWaitsItself = true;
  static constexpr int kTaps = 7;
  using Four = Vector16<float>;
  static constexpr int kChannels = Four::kCount;

  static DCX_HOST_DEVICE int groups(const Params& p) {
    return (static_cast<int>(p.channels) + kChannels - 1) / kChannels;
  }
  // Of a block; p.segment: outputs of each.
  static DCX_HOST_DEVICE int stretches(const Params& p) { return kThreads / groups(p); }
  // Odd, so that neighbouring stretches lie in different banks.
  static DCX_HOST_DEVICE int pitch(const Params& p) { return static_cast<int>(p.segment) | 1; }

  static int64_t smem_bytes(const Params& p) {
    return int64_t{groups(p)} * stretches(p) * pitch(p) * static_cast<int64_t>(sizeof(float));
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    float* partial = reinterpret_cast<float*>(smem);  // [groups][stretches][pitch]
    const int count = groups(p), side = stretches(p), outputs = static_cast<int>(p.segment);
    const int64_t b = block_x() / p.row_tiles, q0 = block_x() % p.row_tiles * (side * outputs);
    const int group = thread_index() % count, stretch = thread_index() / count;
    if (!p.weights_stand) grid_wait();
    const Layer layer(p, group * kChannels);
    const float bias = p.bias != nullptr ? p.bias[0] : 0.0f;
    if (p.weights_stand) grid_wait();
    const int64_t out_steps = minimum(conv_out_valid(p, b), p.rows);
    if (stretch < side && q0 + stretch * outputs < out_steps)
      walk(p, layer, b, q0 + stretch * outputs, group * kChannels, partial + (group * side + stretch) * pitch(p));
    sync_threads();
    float* y = static_cast<float*>(const_cast<void*>(p.y.data)) + b * p.y.stride_b;
    const float* residual = static_cast<const float*>(p.residual.data);
    DCX_NO_UNROLL
    for (int i = thread_index(); i < side * outputs; i += kThreads) {
      const int64_t q = q0 + i;
      if (q >= p.rows) break;
      float value = 0.0f;
      if (q < out_steps) {
        const float* from = partial + i / outputs * pitch(p) + i % outputs;
        float sum = 0.0f;
        for (int g = 0; g < count; ++g) sum += from[g * side * pitch(p)];
        value = finish_activation(sum + bias, p.activation);
        if (residual != nullptr) value += residual[b * p.residual.stride_b + q * p.residual.stride_t];
      }
      y[q * p.y.stride_t] = value;
    }
  }

 private:
  // What a thread keeps of the layer, for the channels from `channel` on.
  struct Layer {
    float weights[kTaps][kChannels], alpha[kChannels], inverse[kChannels];

    DCX_DEVICE Layer(const Params& p, int channel) {
      const float* packed = static_cast<const float*>(p.weight);
      DCX_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        alpha[c] = p.alpha != nullptr && channel + c < p.channels ? p.alpha[channel + c] : 1.0f;
        inverse[c] = snake_inverse(alpha[c]);
        DCX_UNROLL
        for (int j = 0; j < kTaps; ++j)  // zero past the last channel
          weights[j][c] = packed[(j * p.channels_padded + channel + c) * p.columns_padded];
      }
    }
  };

  // The share that the channels from `channel` on have in the outputs from q on, to sums[0 .. p.segment).
  static DCX_DEVICE void walk(const Params& p, const Layer& layer, int64_t b, int64_t q, int channel, float* sums) {
    const bool snakes = p.alpha != nullptr;
    const int64_t first = q - p.pad_left, steps = conv_in_valid(p, b);
    // Rows that there are, counted from the first that is read.
    const int rows = static_cast<int>(p.segment) + kTaps - 1;
    const int begin = static_cast<int>(minimum(maximum(-first, int64_t{0}), int64_t{rows}));
    const int end = static_cast<int>(minimum(maximum(steps - first, int64_t{0}), int64_t{rows}));
    const float* x =
        static_cast<const float*>(p.x.data) + b * p.x.stride_b + first * p.x.stride_t + channel * p.x.stride_c;
    const int there = static_cast<int>(minimum(int64_t{kChannels}, p.channels - channel));
    float running[kTaps];  // running[r % kTaps]: of the output whose first row is r
    // The rows from r0 on, of which begin..end are there.
    const auto load = [&](Four(&row)[kTaps], int r0) {
      if (p.vectors && r0 >= begin && r0 + kTaps <= end) {
        DCX_UNROLL
        for (int k = 0; k < kTaps; ++k) row[k] = *reinterpret_cast<const Four*>(x + k * p.x.stride_t);
      } else {
        DCX_UNROLL
        for (int k = 0; k < kTaps; ++k) {
          const bool valid = r0 + k >= begin && r0 + k < end;
          DCX_UNROLL
          for (int c = 0; c < kChannels; ++c)
            row[k].values[c] = valid && c < there ? x[k * p.x.stride_t + c * p.x.stride_c] : 0.0f;
        }
      }
      x += kTaps * p.x.stride_t;
    };
    Four row[kTaps], next[kTaps];  // the next rows are on their way while these are multiplied
    load(row, 0);
    DCX_NO_UNROLL
    for (int r0 = 0; r0 < rows; r0 += kTaps) {
      if (r0 + kTaps < rows) load(next, r0 + kTaps);
      DCX_UNROLL
      for (int k = 0; k < kTaps; ++k) {
        running[k] = 0.0f;
        DCX_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          float value = row[k].values[c];
          if (snakes) value = snake(value, layer.alpha[c], layer.inverse[c]);
          DCX_UNROLL
          for (int j = 0; j < kTaps; ++j) {
            float& sum = running[(k - j + kTaps) % kTaps];
            sum = fused_multiply_add(value, layer.weights[j][c], sum);
          }
        }
        if (r0 + k >= kTaps - 1) sums[r0 + k - (kTaps - 1)] = running[(k + 1) % kTaps];
      }
      DCX_UNROLL
      for (int k = 0; k < kTaps; ++k) row[k] = next[k];
    }
  }
};

// Whether the layer is one for this or tap_columns_conv.cuh: whatever its memory looks like, since NarrowConv adds in
// another order.
inline bool slides(const ConvGemmParams& p, int64_t most_channels) {
  return p.columns == 1 && p.taps == 7 && p.row_scale == 1 && p.row_step == 1 && p.dilation == 1 &&
         p.channels <= most_channels;
}

// Long stretches read fewer rows twice, short ones fill the device.
inline void plan_sliding(const CudaContext& context, ConvGemmPlan& plan) {
  using K = SlidingConv;
  ConvGemmParams& p = plan.params;
  p.vectors = moves_in_vectors(p.x, p.channels, K::kChannels);
  for (const int passes : {10, 5, 3, 2}) {  // of kTaps rows
    p.segment = passes * K::kTaps - (K::kTaps - 1);
    p.row_tiles = ceil_div(p.rows, K::stretches(p) * p.segment);
    if (p.batch * p.row_tiles >= 2 * context.multiprocessors) break;
  }
  start_row_tiles<K>(plan);
}

}  // namespace dcx
