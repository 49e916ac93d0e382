#include "../../kernels/stream_rows/stream_rows.cuh"

#include "views.h"

// y: `to` as it is afterwards, [B, N] of `source`'s dtype; runs: [n, 3] of to, source and count; `kept` [B] int64.
void run_case(Case& c) {
  const Array& source = c.at("source");
  const Array& before = c.at("to");
  const Array& runs = c.at("runs");
  const Array& to = c.output("y", before.dtype, before.shape);
  if (before.bytes() > 0) memcpy(to.data, before.data, before.bytes());
  const Array& error = c.output("error", "int64", {1});
  *error.as<int64_t>() = c.number("error_before");
  dcx::StreamRowsParams p{};
  p.to = to.data;
  p.source = shifted(source, c);
  p.to_stride = to.shape[1];
  p.source_stride = source.shape[1];
  p.batch = to.shape[0];
  if (c.has("kept")) {
    bool* kept = static_cast<bool*>(c.scratch(static_cast<size_t>(p.batch)));
    for (int64_t b = 0; b < p.batch; ++b) kept[b] = c.at("kept").as<int64_t>()[b] != 0;
    p.kept = kept;
  }
  if (c.number("tells", 1) != 0) p.error = error.as<int64_t>();
  p.run_count = static_cast<int>(runs.shape[0]);
  for (int i = 0; i < p.run_count; ++i) {
    const int64_t* run = runs.as<int64_t>() + 3 * i;
    p.runs[i] = dcx::StreamRun{run[0], run[1], run[2], 0};
  }
  dcx::launch_stream_rows_of(context_of(c), p, to.element_bytes());
}
