// y = act(bias + conv(snake(x))) + residual for seven taps, stride 1, dilation 1 and one output, 16-bit: the decoder's
// last convolution, as one product on tensor cores whose columns are the taps. P[t][j] = snake(x)[t] . w_j holds what
// row t gives to the output of its tap j; y[q] is the sum of P[q + j][j]. So each value is loaded, snaked and rounded
// once, and eight columns take the place of seven convolutions of one. A warp multiplies 16 or 32 rows at a time
// straight from memory, while the next ones are on their way; P stands in shared memory, tap by tap. float32 sums: the
// channels in rising order, then the taps.
#pragma once
#include "../common/conv_finish.cuh"
#include "row_tiles.cuh"

namespace dcx {

// kDeep: the channels, in 16s.
template <class T, int kDeep>
struct TapColumnsConv {
  using Params = ConvGemmParams;
  static constexpr int kThreads = 128, kMinBlocks = kDeep > 3 ? 2 : kCompiledFor == 100 ? 3 : 4;
  static constexpr bool kNeedsSm80 = DTypeOf<T>::value == DType::kBF16, kWaitsItself = true;
  static constexpr int kTaps = 7;
  static constexpr int kTiles = kDeep > 3 ? 1 : 2;  // of 16 rows, that a warp multiplies at a time
  static constexpr int kRows = kThreads / kWarp * kTiles * 16;
  static constexpr int kQuarter = 4;  // channels of 16 that a thread has: its products' k, in whatever order
  using Words = Vector16<uint32_t>;   // a thread's channels of two rows, 8 apart

  // p.segment: the block's rows, a multiple of kRows. Taps lie so far apart that a store of one is of all banks.
  static DCX_HOST_DEVICE int pitch(const Params& p) { return static_cast<int>(p.segment) + 4; }
  static DCX_HOST_DEVICE int outputs(const Params& p) { return static_cast<int>(p.segment) - (kTaps - 1); }
  static int64_t smem_bytes(const Params& p) { return int64_t{kTaps} * pitch(p) * static_cast<int64_t>(sizeof(float)); }

  static DCX_DEVICE void run(const Params& p, unsigned char* smem) {
    float* products = reinterpret_cast<float*>(smem);  // [kTaps][pitch]
    if (!p.weights_stand) grid_wait();
    const Layer layer(p);
    const float bias = p.bias != nullptr ? p.bias[0] : 0.0f;
    if (p.weights_stand) grid_wait();
    const int per_clip = static_cast<int>(p.row_tiles), tiles = static_cast<int>(p.batch) * per_clip;
    DCX_NO_UNROLL
    for (int tile = static_cast<int>(block_x()); tile < tiles; tile += static_cast<int>(p.walking_blocks)) {
      const int64_t b = tile / per_clip, q0 = int64_t{tile % per_clip} * outputs(p);
      const int64_t out_steps = minimum(conv_out_valid(p, b), p.rows);
      if (q0 < out_steps) multiply(p, layer, b, q0, products);
      sync_threads();
      add_taps(p, bias, b, q0, out_steps, products);
      sync_threads();
    }
  }

 private:
  static DCX_DEVICE int lane() { return thread_index() % kWarp; }
  static DCX_DEVICE int first_channel(int deep) { return deep * 16 + lane() % 4 * kQuarter; }

  // What a thread keeps of the layer: of its channels the weights of tap lane / 4, zeros where there is none.
  struct Layer {
    uint32_t weights[kDeep][2];
    float alpha[kDeep][kQuarter], inverse[kDeep][kQuarter];

    DCX_DEVICE Layer(const Params& p) {
      const T* packed = static_cast<const T*>(p.weight);
      const int tap = lane() / 4;
      DCX_UNROLL
      for (int deep = 0; deep < kDeep; ++deep) {
        float own[kQuarter];
        DCX_UNROLL
        for (int i = 0; i < kQuarter; ++i) {
          const int c = first_channel(deep) + i;
          const bool there = c < p.channels;
          own[i] = there && tap < kTaps ? to_float(packed[(tap * p.channels_padded + c) * p.columns_padded]) : 0.0f;
          alpha[deep][i] = there && p.alpha != nullptr ? p.alpha[c] : 1.0f;
          inverse[deep][i] = snake_inverse(alpha[deep][i]);
        }
        DCX_UNROLL
        for (int w = 0; w < 2; ++w) weights[deep][w] = pack_pair<T>(own[2 * w], own[2 * w + 1]);
      }
    }
  };

  struct alignas(8) Half {
    uint32_t values[2];
  };

  // A thread's channels of the rows `row` and every 8 rows on, zeros past the channels and outside begin..end.
  static DCX_DEVICE void load(const Params& p, const T* x, int row, int begin, int end, Words (&words)[kTiles][kDeep]) {
    const int first = row - lane() / 4;  // of the warp
    const T* from = x + row * p.x.stride_t;
    const auto put = [&](int i, int deep, Half own) {
      words[i / 2][deep].values[i % 2 * 2] = own.values[0];
      words[i / 2][deep].values[i % 2 * 2 + 1] = own.values[1];
    };
    if (p.vectors && first >= begin && first + kTiles * 16 <= end) {
      from += first_channel(0);
      DCX_UNROLL
      for (int i = 0; i < kTiles * 2; ++i, from += 8 * p.x.stride_t) DCX_UNROLL
      for (int deep = 0; deep < kDeep; ++deep)
        put(i, deep, first_channel(deep) < p.channels ? *reinterpret_cast<const Half*>(from + deep * 16) : Half{});
    } else {
      DCX_UNROLL
      for (int i = 0; i < kTiles * 2; ++i, from += 8 * p.x.stride_t) {
        const bool counts = row + i * 8 >= begin && row + i * 8 < end;
        DCX_UNROLL
        for (int deep = 0; deep < kDeep; ++deep)
          put(i, deep, counts ? load_singly(p, from, first_channel(deep)) : Half{});
      }
    }
  }
  static DCX_DEVICE Half load_singly(const Params& p, const T* from, int channel) {
    T values[kQuarter];
    DCX_UNROLL
    for (int v = 0; v < kQuarter; ++v) values[v] = channel + v < p.channels ? from[(channel + v) * p.x.stride_c] : T{};
    Half own;
    memcpy(&own, &values, sizeof(own));
    return own;
  }

  // Snake, and the order of a product's operand: rows 0 and 8 of the first two channels, then of the others.
  static DCX_DEVICE void snake_words(const Layer& layer, int deep, Words& words) {
    DCX_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int c = w % 2 * 2;
      const float low = value_of<T>(words, w * 2), high = value_of<T>(words, w * 2 + 1);
      words.values[w] = pack_pair<T>(snake_as<T>(low, layer.alpha[deep][c], layer.inverse[deep][c]),
                                     snake_as<T>(high, layer.alpha[deep][c + 1], layer.inverse[deep][c + 1]));
    }
  }

  // The products of a block's rows, which begin with those of output q0.
  static DCX_DEVICE void multiply(const Params& p, const Layer& layer, int64_t b, int64_t q0, float* products) {
    const int64_t first = q0 - p.pad_left;
    const int rows = static_cast<int>(p.segment);
    // Rows that there are.
    const int begin = static_cast<int>(minimum(maximum(-first, int64_t{0}), int64_t{rows}));
    const int end = static_cast<int>(minimum(maximum(conv_in_valid(p, b) - first, int64_t{0}), int64_t{rows}));
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + first * p.x.stride_t;
    const int own_row = thread_index() / kWarp * (kTiles * 16) + lane() / 4;
    const int column = lane() % 4 * 2;
    float* to = products + column * pitch(p) + own_row;
    Words words[kTiles][kDeep], next[kTiles][kDeep];
    DCX_NO_UNROLL
    for (int row = own_row - kRows; row < rows; row += kRows) {
      if (row + kRows < rows) load(p, x, row + kRows, begin, end, next);
      if (row >= 0) {
        DCX_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          float sums[4] = {};
          DCX_UNROLL
          for (int deep = 0; deep < kDeep; ++deep) {
            Words& own = words[tile][deep];
            if (p.alpha != nullptr) snake_words(layer, deep, own);
            const uint32_t a[4] = {own.values[0], own.values[2], own.values[1], own.values[3]};
            mma_16x8x16<T>(sums, a, layer.weights[deep][0], layer.weights[deep][1]);
          }
          DCX_UNROLL
          for (int i = 0; i < 4; ++i)
            if (column + i % 2 < kTaps) to[i % 2 * pitch(p) + tile * 16 + i / 2 * 8] = sums[i];
        }
        to += kRows;
      }
      DCX_UNROLL
      for (int i = 0; i < kTiles * kDeep; ++i) words[i / kDeep][i % kDeep] = next[i / kDeep][i % kDeep];
    }
  }

  static DCX_DEVICE void add_taps(const Params& p, float bias, int64_t b, int64_t q0, int64_t out_steps,
                                  const float* products) {
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + b * p.y.stride_b + q0 * p.y.stride_t;
    const T* residual = static_cast<const T*>(p.residual.data);
    const int there = static_cast<int>(minimum(int64_t{outputs(p)}, p.rows - q0));
    DCX_NO_UNROLL
    for (int i = thread_index(); i < there; i += kThreads) {
      const int64_t q = q0 + i;
      float value = 0.0f;
      if (q < out_steps) {
        float sum = 0.0f;
        DCX_UNROLL
        for (int j = 0; j < kTaps; ++j) sum += products[j * (pitch(p) + 1) + i];
        value = finish_activation(sum + bias, p.activation);
        if (residual != nullptr) value += to_float(residual[b * p.residual.stride_b + q * p.residual.stride_t]);
      }
      y[i * p.y.stride_t] = from_float<T>(value);
    }
  }
};

// Long segments multiply fewer rows twice, short ones fill the device. Blocks take tile after tile.
template <class T, int kDeep>
void plan_tap_columns(const CudaContext& context, ConvGemmPlan& plan) {
  using K = TapColumnsConv<T, kDeep>;
  ConvGemmParams& p = plan.params;
  const int64_t at_once = int64_t{K::kMinBlocks} * context.multiprocessors;
  p.vectors = moves_in_vectors(p.x, p.channels, Vector16<T>::kCount);
  for (const int64_t passes : {4, 2, 1}) {
    p.segment = passes * K::kRows;
    p.row_tiles = ceil_div(p.rows, int64_t{K::outputs(p)});
    if (p.batch * p.row_tiles >= at_once) break;
  }
  start_row_tiles<K>(plan);
  p.walking_blocks = plan.grid.x = minimum(plan.grid.x, at_once);
}

}  // namespace dcx
