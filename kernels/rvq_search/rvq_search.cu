#include "rvq_search.cuh"

namespace dcx {

void launch_rvq_search_cuda(const CudaContext& context, const RvqSearchParams& params) {
  start_rvq_search_of(context, params);
}

}  // namespace dcx
