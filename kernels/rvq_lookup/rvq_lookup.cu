#include "rvq_lookup.cuh"

namespace dcx {

void launch_rvq_lookup_cuda(const CudaContext& context, const RvqLookupParams& params) {
  start_rvq_lookup_of(context, params);
}

}  // namespace dcx
