// Snake on the device: x + sin(alpha x)^2 / (alpha + 1e-9), by the reduction and polynomial of snake.h.
#pragma once
#include <math.h>

#include "device.cuh"

namespace dcx {

// For |alpha x| > 1e4, infinity and NaN: a double-precision sine. Out of line, so that it costs the usual path nothing.
DCX_DEVICE_COLD float snake_far(float x, float alpha, float inverse) {
  const double s = sin(static_cast<double>(alpha) * static_cast<double>(x));
  return static_cast<float>(static_cast<double>(x) + s * s * static_cast<double>(inverse));
}

DCX_DEVICE float snake_inverse(float alpha) { return 1.0f / (alpha + 1e-9f); }

// inverse: snake_inverse(alpha).
DCX_DEVICE float snake(float x, float alpha, float inverse) {
  const float y = alpha * x;
  const float n = fused_multiply_add(y, 0.318309886183790672f, 12582912.0f) - 12582912.0f;
  float t = fused_multiply_add(n, -3.140625f, y);
  t = fused_multiply_add(n, -9.67502593994140625e-4f, t);
  t = fused_multiply_add(n, -1.509957990978376e-7f, t);
  const float s = t * t;
  float p = fused_multiply_add(s, -2.38880801039586421e-8f, 2.75252006066006e-6f);
  p = fused_multiply_add(p, s, -0.000198408599651234484f);
  p = fused_multiply_add(p, s, 0.00833333096483573796f);
  p = fused_multiply_add(p, s, -0.166666666165675098f);
  p = fused_multiply_add(p, s, 1.0f);
  t = t * p;
  if (!(fabsf(y) <= 1e4f)) return snake_far(x, alpha, inverse);
  return fused_multiply_add(t * t, inverse, x);
}

}  // namespace dcx
