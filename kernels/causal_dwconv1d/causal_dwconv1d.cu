#include "causal_dwconv1d.cuh"

namespace dcx {

void launch_causal_dwconv1d_cuda(const CudaContext& context, const CausalDwconv1dParams& params) {
  launch_causal_dwconv1d_of(context, params);
}

}  // namespace dcx
