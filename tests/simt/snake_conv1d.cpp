#include "../../kernels/snake_conv1d/snake_conv1d.cuh"

#include "../../kernels/common/conv_gemm_launch.cuh"
#include "views.h"

void run_case(Case& c) {
  const Array& x = c.at("x");
  dcx::SnakeConv1dParams p{};
  p.x = view_of(x, c);
  p.batch = x.shape[0];
  p.in_steps = x.shape[1];
  p.in_channels = x.shape[2];
  p.out_channels = c.number("columns");
  p.taps = c.number("taps");
  p.stride = c.number("stride", 1);
  p.dilation = c.number("dilation", 1);
  p.pad_left = c.number("left", 0);
  p.pad_right = c.number("right", 0);
  p.activation = static_cast<dcx::Activation>(c.number("activation", 0));
  p.out_steps = dcx::conv_output_steps(p.in_steps, p.taps, p.stride, p.dilation, p.pad_left, p.pad_right);
  p.weight = c.at("weight").data;
  p.bias = c.data<float>("bias");
  p.alpha = c.data<float>("alpha");
  p.lengths = c.data<int64_t>("lengths");
  if (c.has("residual")) p.residual = view_of(c.at("residual"), c);
  p.y = view_of(c.output("y", x.dtype, {p.batch, p.out_steps, p.out_channels}), c);
  if (p.batch > 0 && p.out_steps > 0) start(c, dcx::plan_snake_conv1d_of(context_of(c), p));
}
