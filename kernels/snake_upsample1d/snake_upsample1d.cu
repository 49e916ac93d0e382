#include "snake_upsample1d.cuh"

namespace dcx {

ConvGemmPlan plan_snake_upsample1d_cuda(const CudaContext& context, const SnakeUpsample1dParams& params) {
  return plan_snake_upsample1d_of(context, params);
}

}  // namespace dcx
