#include "../../kernels/rvq_lookup/rvq_lookup.cuh"

#include "views.h"

// y and the addend are [B, C, F], or [B, F, C] as "frames_first"; no "error" cell: as while a graph is captured.
void run_case(Case& c) {
  dcx::RvqLookupParams p{};
  const Array& codes = c.at("codes");
  const int64_t channels = c.number("channels");
  p.layout = dcx::RvqLayout{c.number("stages"), c.number("entries"), c.number("dim"), channels};
  if (c.at("packed").numel() != p.layout.total()) throw std::runtime_error("packed is of another layout");
  p.packed = c.at("packed").data;
  p.lengths = c.data<int64_t>("lengths");
  p.codes = codes.as<int64_t>();
  p.batch = codes.shape[0];
  p.used = codes.shape[1];
  p.frames = codes.shape[2];
  const bool frames_first = c.number("frames_first", 0) != 0;
  const auto view = [&](const Array& a) {
    return dcx::TensorView{a.data, a.kernel_dtype(), channels * p.frames, frames_first ? 1 : p.frames,
                           frames_first ? channels : 1};
  };
  const std::vector<int64_t> shape = frames_first ? std::vector<int64_t>{p.batch, p.frames, channels}
                                                  : std::vector<int64_t>{p.batch, channels, p.frames};
  if (c.has("addend")) p.addend = view(c.at("addend"));
  p.y = view(c.output("y", c.has("addend") ? c.at("addend").dtype : "float32", shape));
  if (c.number("tells", 1) != 0) {
    p.error = c.output("error", "int64", {1}).as<int64_t>();
    *p.error = INT64_MAX;
  }
  dcx::start_rvq_lookup_of(context_of(c), p);
}
