#pragma once
#include "../common/cuda_context.h"
#include "../common/dtype.h"
#include "../rvq_lookup/params.h"

namespace dcx {

constexpr int kMostStreamRuns = 96;  // of a launch: parameters are 4 KB at most

// Elements that lie side by side in every row of both tensors.
struct StreamRun {
  int64_t to, source;  // where the run begins, counted from a row's first element
  int64_t count;
  int64_t block;  // the first of its blocks in a row; by the launcher
};

// to[b, runs[i].to + n] = source[b, runs[i].source + n]. The launcher counts elements as the units that it moves.
struct StreamRowsParams {
  void* to;
  const void* source;
  int64_t to_stride, source_stride;  // from row to row
  int64_t batch;
  const bool* kept;  // [batch], the rows that are copied; null: all, and *error becomes kNoWrongCode
  int64_t* error;    // null: none; with kept: other than kNoWrongCode nothing is copied
  int64_t blocks;    // per row; by the launcher
  int run_count;
  StreamRun runs[kMostStreamRuns];
};

// element_bytes: 2 or 4.
void launch_stream_rows_cuda(const CudaContext& context, const StreamRowsParams& params, int64_t element_bytes);

}  // namespace dcx
