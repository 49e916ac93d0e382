#include "take_codes.cuh"

namespace dcx {

void launch_take_codes_cuda(const CudaContext& context, const TakeCodesParams& params) {
  launch_take_codes_of(context, params);
}

}  // namespace dcx
