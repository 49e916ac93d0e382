#include "snake_conv1d.cuh"

namespace dcx {

ConvGemmPlan plan_snake_conv1d_cuda(const CudaContext& context, const SnakeConv1dParams& params) {
  return plan_snake_conv1d_of(context, params);
}

}  // namespace dcx
