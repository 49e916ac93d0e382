#include "../../kernels/snake_upsample1d/snake_upsample1d.cuh"

#include "../../kernels/common/conv_gemm_launch.cuh"
#include "views.h"

void run_case(Case& c) {
  const Array& x = c.at("x");
  dcx::SnakeUpsample1dParams p{};
  p.x = view_of(x, c);
  p.batch = x.shape[0];
  p.in_steps = x.shape[1];
  p.in_channels = x.shape[2];
  p.out_channels = c.number("columns");
  p.phases = dcx::UpsamplePhases{static_cast<dcx::UpsampleMode>(c.number("mode")), c.number("stride"), c.number("left"),
                                 c.number("right")};
  // A stretch of `count` from output step `first` on, a multiple of the stride, as csrc has it.
  const int64_t first = c.number("first", 0);
  p.phases.pad_left += p.phases.mode == dcx::UpsampleMode::kTransposed ? first : -first;
  p.out_steps = c.number("count", p.phases.output_steps(p.in_steps));
  p.weight = c.at("weight").data;
  p.bias = c.data<float>("bias");
  p.alpha = c.data<float>("alpha");
  p.lengths = c.data<int64_t>("lengths");
  p.y = view_of(c.output("y", x.dtype, {p.batch, p.out_steps, p.out_channels}), c);
  p.out_alpha = c.data<float>("out_alpha");
  if (p.out_alpha != nullptr) p.y_snaked = c.output("y_snaked", x.dtype, {p.batch, p.out_steps, p.out_channels}).data;
  if (p.batch > 0 && p.out_steps > 0) start(c, dcx::plan_snake_upsample1d_of(context_of(c), p));
}
