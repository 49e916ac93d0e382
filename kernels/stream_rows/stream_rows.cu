#include "stream_rows.cuh"

namespace dcx {

void launch_stream_rows_cuda(const CudaContext& context, const StreamRowsParams& params, int64_t element_bytes) {
  launch_stream_rows_of(context, params, element_bytes);
}

}  // namespace dcx
