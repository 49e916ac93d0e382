// Snake on the device: x + sin(alpha x)^2 / (alpha + 1e-9), by the reduction and polynomial of snake.h.
#pragma once
#include <math.h>

#include "device.cuh"

namespace dcx {

// sin(t)^2 for |t| <= pi / 2.
DCX_DEVICE float sin_squared(float t) {
  const float s = t * t;
  float p = fused_multiply_add(s, -2.38880801039586421e-8f, 2.75252006066005060e-6f);
  p = fused_multiply_add(p, s, -0.000198408599651234484f);
  p = fused_multiply_add(p, s, 0.00833333096483573796f);
  p = fused_multiply_add(p, s, -0.166666666165675098f);
  p = fused_multiply_add(p, s, 1.0f);
  const float sine = t * p;
  return sine * sine;
}

// Word i of the binary digits of 1 / pi behind the point.
DCX_DEVICE uint64_t inverse_pi_word(int i) {
  switch (i) {
    case 0:
      return 0x517cc1b727220a94ull;
    case 1:
      return 0xfe13abe8fa9a6ee0ull;
    case 2:
      return 0x6db14acc9e21c820ull;
    case 3:
      return 0xff28b1d5ef5de2b0ull;
    case 4:
      return 0xdb92371d2126e970ull;
    case 5:
      return 0x0324977504e8c90eull;
    default:
      return 0x7f0ef58e5894d39full;
  }
}

// sin(y)^2 for 1e4 < y <= 2^256, exact but for the last rounding: y / pi is taken modulo 1 in integers, from the 128
// digits of 1 / pi that its whole part leaves. Out of line and without a library's sine, whose tables would need a
// stack.
DCX_DEVICE_COLD float sin_squared_far(double y) {
  const uint64_t bits = bits_of(y);
  const int exponent = static_cast<int>(bits >> 52) - 1075;  // y = mantissa * 2^exponent
  const uint64_t mantissa = (bits & 0xfffffffffffffull) | 0x10000000000000ull;
  const int start = exponent > 0 ? exponent : 0, word = start / 64, shift = start % 64;
  uint64_t high = inverse_pi_word(word), low = inverse_pi_word(word + 1);
  if (shift > 0) {
    high = high << shift | low >> (64 - shift);
    low = low << shift | inverse_pi_word(word + 2) >> (64 - shift);
  }
  // mantissa * (high, low) / 2^128, whose whole part is a multiple of pi; below 2^64 it is lost in the rounding.
  const uint64_t cross = multiply_high(mantissa, low);
  uint64_t part = mantissa * high + cross;
  const uint64_t whole = multiply_high(mantissa, high) + (part < cross ? 1 : 0);
  if (exponent < 0) part = part >> -exponent | whole << (64 + exponent);
  const double turn = static_cast<double>(static_cast<int64_t>(part)) * 5.421010862427522e-20;  // in [-1/2, 1/2)
  return sin_squared(static_cast<float>(turn * 3.141592653589793));
}

DCX_DEVICE float snake_inverse(float alpha) { return 1.0f / (alpha + 1e-9f); }

// inverse: snake_inverse(alpha).
DCX_DEVICE float snake(float x, float alpha, float inverse) {
  const float y = alpha * x;
  if (!(fabsf(y) <= 1e4f)) {
    const double exact = fabs(static_cast<double>(alpha) * static_cast<double>(x));
    if (!(exact < static_cast<double>(infinity()))) return not_a_number();
    return fused_multiply_add(sin_squared_far(exact), inverse, x);
  }
  const float n = fused_multiply_add(y, 0.318309886183790672f, 12582912.0f) - 12582912.0f;
  float t = fused_multiply_add(n, -3.140625f, y);
  t = fused_multiply_add(n, -9.67502593994140625e-4f, t);
  t = fused_multiply_add(n, -1.509957990978376e-7f, t);
  return fused_multiply_add(sin_squared(t), inverse, x);
}

// As a kernel on T needs it. 16-bit values take the sine of the special function unit, whose error, 2e-6 and a 2e-7th
// of |alpha x|, lies far below their own rounding.
template <class T>
DCX_DEVICE float snake_as(float x, float alpha, float inverse) {
  if constexpr (sizeof(T) == 4) return snake(x, alpha, inverse);
  const float sine = approximate_sine(alpha * x);
  return fused_multiply_add(sine * sine, inverse, x);
}

}  // namespace dcx
