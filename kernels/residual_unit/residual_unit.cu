#include "residual_unit_launch.cuh"

namespace dcx {

int64_t residual_unit_hidden(const CudaContext& context, const ResidualUnitParams& params) {
  return residual_unit_hidden_of(context, params);
}

ResidualUnitPlan plan_residual_unit_cuda(const CudaContext& context, const ResidualUnitParams& params, void* hidden) {
  return plan_residual_unit_of(context, params, hidden);
}

}  // namespace dcx
