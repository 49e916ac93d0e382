#include "../../kernels/residual_unit/residual_unit_groups.cuh"
#include "../../kernels/residual_unit/residual_unit_launch.cuh"

#include "views.h"

namespace {

dcx::ResidualUnitParams params_of(Case& c) {
  const Array& x = c.at("x");
  dcx::ResidualUnitParams p{};
  p.x = view_of(x, c);
  p.batch = x.shape[0];
  p.in_steps = x.shape[1];
  p.channels = x.shape[2];
  p.dilation = c.number("dilation");
  p.pad_left = c.number("left");
  p.pad_right = c.number("right");
  p.centre = c.number("centre");
  p.out_steps = dcx::conv_output_steps(p.in_steps, dcx::kResidualUnitTaps, 1, p.dilation, p.pad_left, p.pad_right);
  const int64_t pointwise = dcx::round_up(p.channels, dcx::kChannelUnit) * dcx::round_up(p.channels, dcx::kColumnUnit);
  const Array& weight = c.at("weight");
  p.weight1 = weight.data;
  p.weight2 = weight.as<char>() + dcx::kResidualUnitTaps * pointwise * weight.element_bytes();
  p.bias1 = c.data<float>("bias1");
  p.bias2 = c.data<float>("bias2");
  p.alpha1 = c.data<float>("alpha1");
  p.alpha2 = c.data<float>("alpha2");
  p.out_alpha = c.data<float>("out_alpha");
  p.lengths = c.data<int64_t>("lengths");
  p.y = view_of(c.output("y", x.dtype, {p.batch, p.out_steps, p.channels}), c);
  if (c.has("snaked")) p.x_snaked = view_of(c.at("snaked"), c);
  if (c.number("pair", 0) != 0) p.y_snaked = c.output("y_snaked", x.dtype, {p.batch, p.out_steps, p.channels}).data;
  return p;
}

}  // namespace

#if defined(DCX_GROUP_KERNELS)  // quick to compile

// By channels a kernel whose weights stay, one whose weights stream, and teams.
void run_case(Case& c) {
  const dcx::ResidualUnitParams p = params_of(c);
  dcx::ResidualUnitPlan plan = dcx::prepare_fused(p);
  if (p.channels == 48)
    dcx::plan_tiles<dcx::WgmmaUnit<dcx::bf16, 48, 1, 48, 0, 3>>(context_of(c), p, plan);
  else if (p.channels == 72)
    dcx::plan_tiles<dcx::WgmmaTeams<dcx::bf16, 96, 1>>(context_of(c), p, plan);
  else
    dcx::plan_tiles<dcx::WgmmaUnit<dcx::bf16, 96, 1, 48, 5, 2>>(context_of(c), p, plan);
  plan.start(context_of(c), plan);
}

#elif defined(DCX_HALVES)

// By channels a ring whose steps wait for a tile's rows before its end, and one that leaves them for the next tile.
void run_case(Case& c) {
  const dcx::ResidualUnitParams p = params_of(c);
  dcx::ResidualUnitPlan plan = dcx::prepare_fused(p);
  if (p.channels == 192)
    dcx::plan_tiles<dcx::WgmmaHalves<dcx::bf16, 192, 1, 4>>(context_of(c), p, plan);
  else
    dcx::plan_tiles<dcx::WgmmaHalves<dcx::bf16, 192, 1, 6>>(context_of(c), p, plan);
  plan.start(context_of(c), plan);
}

#elif defined(DCX_ONE_KERNEL)

void run_case(Case& c) {
  const dcx::ResidualUnitParams p = params_of(c);
  dcx::ResidualUnitPlan plan = dcx::prepare_fused(p);
  dcx::plan_fused<DCX_ONE_KERNEL>(p, plan);
  plan.start(context_of(c), plan);
}

#else

#include "../../kernels/common/conv_gemm_launch.cuh"

void run_case(Case& c) {
  const dcx::ResidualUnitParams p = params_of(c);
  const dcx::CudaContext context = context_of(c);
  const int64_t numel = dcx::residual_unit_hidden_of(context, p);
  void* hidden = c.scratch(static_cast<size_t>(numel * c.at("x").element_bytes()));
  const dcx::ResidualUnitPlan plan = dcx::plan_residual_unit_of(context, p, hidden);
  if (plan.fused != (numel == 0)) throw std::runtime_error("the plan and its memory do not agree");
  if (plan.fused) {
    plan.start(context, plan);
  } else {
    start(c, plan.first);
    start(c, plan.second);
  }
}

#endif
