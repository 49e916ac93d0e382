#include "../../kernels/rvq_search/rvq_search.cuh"

#include "views.h"

// z is the memory that `strides` [3] and `shape` [3] describe; outputs are contiguous, quantized also as
// "frames_first".
void run_case(Case& c) {
  dcx::RvqSearchParams p{};
  const int64_t* shape = c.data<int64_t>("shape");
  const int64_t* strides = c.data<int64_t>("strides");
  p.z = dcx::TensorView{c.at("z").data, c.at("z").kernel_dtype(), strides[0], strides[1], strides[2]};
  p.layout = dcx::RvqLayout{c.number("stages"), c.number("entries"), c.number("dim"), shape[1]};
  if (c.at("packed").numel() != p.layout.total()) throw std::runtime_error("packed is of another layout");
  p.packed = c.at("packed").data;
  p.lengths = c.data<int64_t>("lengths");
  p.batch = shape[0];
  p.frames = shape[2];
  p.used = c.number("used", p.layout.stages);
  p.codes = c.output("codes", "int64", {p.batch, p.used, p.frames}).as<int64_t>();
  if (c.number("margins", 0) != 0) p.margin = c.output("margin", "float32", {p.batch, p.used, p.frames}).data;
  if (c.number("sums", 0) != 0) {
    const bool frames_first = c.number("frames_first", 0) != 0;
    const std::vector<int64_t> out = frames_first ? std::vector<int64_t>{shape[0], shape[2], shape[1]}
                                                  : std::vector<int64_t>{shape[0], shape[1], shape[2]};
    const Array& y = c.output("quantized", c.at("z").dtype, out);
    p.quantized = dcx::TensorView{y.data, y.kernel_dtype(), shape[1] * shape[2], frames_first ? 1 : shape[2],
                                  frames_first ? shape[1] : 1};
  }
  dcx::start_rvq_search_of(context_of(c), p);
}
