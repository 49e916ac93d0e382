#include "../../kernels/causal_dwconv1d/causal_dwconv1d.cuh"

#include "views.h"

void run_case(Case& c) {
  const Array& x = c.at("x");
  const Array& weight = c.at("weight");
  dcx::CausalDwconv1dParams p{};
  p.x = view_of(x, c);
  p.x.data = shifted(x, c);
  p.batch = x.shape[0];
  p.in_steps = x.shape[1];
  p.channels = x.shape[2];
  p.taps = weight.shape[1];
  p.pad_left = c.number("left", p.taps - 1);
  p.pad_right = c.number("right", 0);
  p.out_steps = dcx::conv_output_steps(p.in_steps, p.taps, 1, 1, p.pad_left, p.pad_right);
  p.weight = shifted(weight, c);
  p.bias = c.data<float>("bias");
  p.ln_weight = c.data<float>("ln_weight");
  p.ln_bias = c.data<float>("ln_bias");
  p.eps = static_cast<double>(c.has("eps") ? *c.at("eps").as<float>() : 1e-6f);
  p.lengths = c.data<int64_t>("lengths");
  p.y = view_of(c.output("y", x.dtype, {p.batch, p.out_steps, p.channels}), c);
  dcx::launch_causal_dwconv1d_of(context_of(c), p);
}
