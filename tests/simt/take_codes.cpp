#include "../../kernels/take_codes/take_codes.cuh"

#include "views.h"

namespace {

// Codes [B, q, F] lie in `memory` where `places` says: the first, and strides. They go to what is [B, q, W] like
// `before`, from y on.
dcx::CodesTaken part_of(const Array& memory, const Array& places, const Array& before, int64_t entries, int64_t* y) {
  if (before.bytes() > 0) memcpy(y, before.data, before.bytes());
  const int64_t* place = places.as<int64_t>();
  dcx::CodesTaken part{};
  part.from = memory.as<int64_t>() + place[0];
  part.stride_b = place[1];
  part.stride_q = place[2];
  part.stride_f = place[3];
  part.to = y;
  part.to_frames = before.shape[2];
  part.stages = before.shape[1];
  part.entries = entries;
  return part;
}

int64_t count_of(const Array& a) { return a.shape[0] * a.shape[1] * a.shape[2]; }

}  // namespace

// y: both parts, one behind the other; the second may be missing.
void run_case(Case& c) {
  const Array& to = c.at("to");
  const bool two = c.has("more_to");
  int64_t* y = c.output("y", "int64", {count_of(to) + (two ? count_of(c.at("more_to")) : 0)}).as<int64_t>();
  dcx::TakeCodesParams p{};
  p.batch = to.shape[0];
  p.frames = c.number("frames");
  p.parts[0] = part_of(c.at("codes"), c.at("places"), to, c.number("entries"), y);
  if (two)
    p.parts[1] =
        part_of(c.at("more_codes"), c.at("more_places"), c.at("more_to"), c.number("more_entries"), y + count_of(to));
  p.wrong = c.output("wrong", "int64", {1}).as<int64_t>();
  *p.wrong = 0;
  dcx::launch_take_codes_of(context_of(c), p);
}
