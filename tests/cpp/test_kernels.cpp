// Kernels against plain loops in double, on every instruction set that this machine has.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "common/gemm_pack.h"
#include "common/runtime.h"
#include "residual_unit/params.h"
#include "snake_conv1d/params.h"

using namespace dcx;

namespace {

std::vector<float> noise(int64_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(generator);
  return values;
}

TensorView channels_last(float* data, int64_t channels, int64_t steps) {
  return TensorView{data, DType::kF32, channels * steps, 1, channels};
}

double snake(double x, double alpha) { return x + std::pow(std::sin(alpha * x), 2) / (alpha + 1e-9); }

void test_residual_unit(int64_t channels, int64_t steps, int64_t dilation) {
  const int64_t ld = round_up(channels, kColumnUnit);
  std::vector<float> x = noise(channels * steps, 1), w1 = noise(channels * channels * 7, 2, 0.05f),
                     w2 = noise(channels * channels, 3, 0.1f);
  std::vector<float> alpha(static_cast<size_t>(channels), 1.25f), bias(static_cast<size_t>(ld), 0.0f);
  for (int64_t c = 0; c < channels; ++c) bias[static_cast<size_t>(c)] = 0.01f * static_cast<float>(c);
  std::vector<float> p1(static_cast<size_t>(7 * channels * ld)), p2(static_cast<size_t>(channels * ld));
  pack_panels(p1.data(), w1.data(), 7, channels, channels, 1, 7, channels * 7);
  pack_panels(p2.data(), w2.data(), 1, channels, channels, 1, 1, channels);
  std::vector<float> y(x.size(), NAN);
  ResidualUnitParams p{};
  p.x = channels_last(x.data(), channels, steps);
  p.y = channels_last(y.data(), channels, steps);
  p.weight1 = p1.data();
  p.weight2 = p2.data();
  p.bias1 = p.bias2 = bias.data();
  p.alpha1 = p.alpha2 = alpha.data();
  p.batch = 1;
  p.channels = channels;
  p.in_steps = p.out_steps = steps;
  p.dilation = dilation;
  p.pad_left = p.pad_right = 3 * dilation;
  p.centre = 3;
  launch_residual_unit_cpu(p);

  std::vector<double> middle(static_cast<size_t>(channels));
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t o = 0; o < channels; ++o) {
      double sum = bias[static_cast<size_t>(o)];
      for (int64_t k = 0; k < 7; ++k) {
        const int64_t at = t + (k - 3) * dilation;
        if (at < 0 || at >= steps) continue;
        for (int64_t c = 0; c < channels; ++c)
          sum += w1[static_cast<size_t>((o * channels + c) * 7 + k)] *
                 snake(x[static_cast<size_t>(at * channels + c)], 1.25);
      }
      middle[static_cast<size_t>(o)] = snake(sum, 1.25);
    }
    for (int64_t o = 0; o < channels; ++o) {
      double sum = bias[static_cast<size_t>(o)] + x[static_cast<size_t>(t * channels + o)];
      for (int64_t c = 0; c < channels; ++c)
        sum += w2[static_cast<size_t>(o * channels + c)] * middle[static_cast<size_t>(c)];
      CHECK_NEAR(y[static_cast<size_t>(t * channels + o)], sum, 2e-5);
    }
  }
}

void test_strided_conv() {
  const int64_t cin = 33, cout = 20, taps = 8, stride = 4, steps = 41, out_steps = (41 + 4 - 8) / 4 + 1;
  std::vector<float> x = noise(cin * steps, 4), w = noise(cout * cin * taps, 5, 0.1f);
  std::vector<float> packed(static_cast<size_t>(taps * cin * round_up(cout, kColumnUnit)));
  pack_panels(packed.data(), w.data(), taps, cin, cout, 1, taps, cin * taps);
  std::vector<float> bias(32, 0.0f), y(static_cast<size_t>(cout * out_steps), NAN);
  SnakeConv1dParams p{};
  p.x = TensorView{x.data(), DType::kF32, cin * steps, steps, 1};  // [C, T] contiguous
  p.y = TensorView{y.data(), DType::kF32, cout * out_steps, out_steps, 1};
  p.weight = packed.data();
  p.bias = bias.data();
  p.batch = 1;
  p.in_channels = cin;
  p.out_channels = cout;
  p.in_steps = steps;
  p.out_steps = out_steps;
  p.taps = taps;
  p.stride = stride;
  p.dilation = 1;
  p.pad_left = p.pad_right = 2;
  p.activation = Activation::kTanh;
  launch_snake_conv1d_cpu(p);
  for (int64_t o = 0; o < cout; ++o)
    for (int64_t t = 0; t < out_steps; ++t) {
      double sum = 0;
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t at = t * stride - 2 + k;
        if (at < 0 || at >= steps) continue;
        for (int64_t c = 0; c < cin; ++c)
          sum += static_cast<double>(w[static_cast<size_t>((o * cin + c) * taps + k)]) *
                 x[static_cast<size_t>(c * steps + at)];
      }
      CHECK_NEAR(y[static_cast<size_t>(o * out_steps + t)], std::tanh(sum), 2e-6);
    }
}

}  // namespace

int main() {
  int sets = 0;
  for (Isa isa : kAllIsas) {
    if (!set_active_isa(isa)) {
      std::printf("kernels: %s is not on this machine\n", isa_name(isa));
      continue;
    }
    ++sets;
    test_residual_unit(48, 70, 9);
    test_residual_unit(17, 5, 1);
    test_strided_conv();
  }
  std::printf("kernels: passed on %d instruction sets\n", sets);
  return 0;
}
