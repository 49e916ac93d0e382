// y = bias + conv(snake(x)) + residual for seven taps, stride 1, dilation 1 and one input channel: the encoder's
// first convolution, which writes far more than it reads. A block snakes its samples once into shared memory; a thread
// keeps eight columns' weights in registers and walks over its rows, neighbouring threads side by side in y. The taps
// are one chain of float32 products.
#pragma once
#include "../common/conv_finish.cuh"
#include "row_tiles.cuh"

namespace dcx {

template <class T>
struct SpreadConv {
  using Params = ConvGemmParams;
  static constexpr int kThreads = 128, kMinBlocks = 4;
  static constexpr bool kNeedsSm80 = DTypeOf<T>::value == DType::kBF16;
  static constexpr int kTaps = 7, kColumns = 8, kVector = Vector16<T>::kCount;
  static constexpr int kRun = 4;  // neighbouring rows of a thread, which share their samples

  static DCX_HOST_DEVICE int cells(const Params& p) { return static_cast<int>(p.columns) / kColumns; }
  // Runs of rows that a block works on at once; p.segment: rows of a thread.
  static DCX_HOST_DEVICE int rows_at_once(const Params& p) { return kThreads / cells(p); }
  static int64_t smem_bytes(const Params& p) {
    return (p.segment * rows_at_once(p) + kTaps - 1) * static_cast<int64_t>(sizeof(float));
  }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    float* samples = reinterpret_cast<float*>(smem);
    const int at_once = rows_at_once(p), rows = static_cast<int>(p.segment) * at_once;
    const int64_t b = block_x() / p.row_tiles, q0 = block_x() % p.row_tiles * rows;
    const int64_t steps = conv_in_valid(p, b), out_steps = conv_out_valid(p, b);
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b;
    const float alpha = p.alpha != nullptr ? p.alpha[0] : 0.0f, inverse = snake_inverse(alpha);
    for (int i = thread_index(); i < rows + kTaps - 1; i += kThreads) {
      const int64_t t = q0 + i - p.pad_left;
      float value = 0.0f;
      if (t >= 0 && t < steps) {
        value = to_float(x[t * p.x.stride_t]);
        if (p.alpha != nullptr) value = snake_as<T>(value, alpha, inverse);
      }
      samples[i] = value;
    }
    const int cell = thread_index() % cells(p), column = cell * kColumns, first = thread_index() / cells(p);
    float weights[kTaps][kColumns], bias[kColumns];
    const T* packed = static_cast<const T*>(p.weight) + column;
    DCX_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      bias[c] = p.bias != nullptr ? p.bias[column + c] : 0.0f;
      DCX_UNROLL
      for (int j = 0; j < kTaps; ++j) weights[j][c] = to_float(packed[j * p.columns_padded + c]);
    }
    sync_threads();
    if (first >= at_once) return;
    const T* residual = static_cast<const T*>(p.residual.data);
    const int64_t last = minimum(p.rows, q0 + rows);
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + b * p.y.stride_b + q0 * p.y.stride_t + column * p.y.stride_c;
    DCX_NO_UNROLL
    for (int row = first * kRun; q0 + row < last; row += at_once * kRun) {
      float near[kRun + kTaps - 1];
      DCX_UNROLL
      for (int i = 0; i < kRun + kTaps - 1; ++i) near[i] = samples[row + i];
      DCX_UNROLL
      for (int r = 0; r < kRun; ++r) {
        const int64_t q = q0 + row + r;
        if (q >= last) break;
        float sums[kColumns] = {};
        DCX_UNROLL
        for (int j = 0; j < kTaps; ++j) DCX_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[c] = fused_multiply_add(near[r + j], weights[j][c], sums[c]);
        Vector16<T> out[kColumns / kVector];
        DCX_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          float value = 0.0f;
          if (q < out_steps) {
            value = sums[c] + bias[c];
            if (residual != nullptr)
              value += to_float(
                  residual[b * p.residual.stride_b + q * p.residual.stride_t + (column + c) * p.residual.stride_c]);
          }
          out[c / kVector].values[c % kVector] = from_float<T>(value);
        }
        T* to = y + (row + r) * p.y.stride_t;
        if (p.vector_store) {
          DCX_UNROLL
          for (int v = 0; v < kColumns / kVector; ++v) *reinterpret_cast<Vector16<T>*>(to + v * kVector) = out[v];
        } else {
          DCX_UNROLL
          for (int c = 0; c < kColumns; ++c) to[c * p.y.stride_c] = out[c / kVector].values[c % kVector];
        }
      }
    }
  }
};

// Whether the layer is one for SpreadConv: whatever its memory looks like, since the GEMM adds in another order.
inline bool spreads(const ConvGemmParams& p) {
  return p.in_channels == 1 && p.activation == Activation::kNone && p.conv_taps == SpreadConv<float>::kTaps &&
         p.conv_stride == 1 && p.conv_dilation == 1 && p.columns % SpreadConv<float>::kColumns == 0 &&
         p.columns <= SpreadConv<float>::kColumns * SpreadConv<float>::kThreads;
}

// Many rows for a block's weights, few to fill the device.
template <class T>
void plan_spread(const CudaContext& context, ConvGemmPlan& plan) {
  using K = SpreadConv<T>;
  ConvGemmParams& p = plan.params;
  p.vector_store = moves_in_vectors(p.y, p.columns, K::kVector);
  for (const int64_t passes : {32, 16, 8, 4}) {
    p.segment = passes;
    p.row_tiles = ceil_div(p.rows, passes * K::rows_at_once(p));
    if (p.batch * p.row_tiles >= 4 * context.multiprocessors) break;
  }
  start_row_tiles<K>(plan);
}

}  // namespace dcx
