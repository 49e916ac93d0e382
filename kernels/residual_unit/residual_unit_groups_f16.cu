#include "residual_unit_groups.cuh"

namespace dcx {

template bool plan_groups<f16>(const CudaContext&, const ResidualUnitParams&, ResidualUnitPlan&);

}  // namespace dcx
