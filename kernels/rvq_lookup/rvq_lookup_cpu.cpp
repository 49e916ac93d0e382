// y = sum of the chosen rows' output projections, one parallel task per (clip, tile of frames).
// A task gathers each frame's rows into a tile [frame][Q D] (zeros for stages not given) and projects all stages by one
// GEMM. A code out of range is never followed: its position is noted, the lowest one wins, and row 0 stands in.
#include "params.h"

#include "../common/gemm.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

constexpr int64_t kTileFrames = 64;

enum Slot { kCode = 0, kOutput = 1, kAddend = 2 };

void note_error(int64_t* error, int64_t position) {
  int64_t seen = __atomic_load_n(error, __ATOMIC_RELAXED);
  while (position < seen &&
         !__atomic_compare_exchange_n(error, &seen, position, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <class T>
void run(const RvqLookupParams& p) {
  const RvqLayout& layout = p.layout;
  const T* packed = static_cast<const T*>(p.packed);
  const int64_t dim = layout.dim, channel_ld = layout.channel_columns(), code_ld = layout.code_columns();
  const int64_t rows = tile_rows(p.frames, p.batch, kTileFrames, 8);
  const int64_t tiles = ceil_div(p.frames, rows);

  parallel(p.batch * tiles, p.batch * p.frames * layout.stages * dim * layout.channels, [&](int64_t task) {
    const int64_t b = task / tiles, f0 = task % tiles * rows;
    const int64_t count = p.frames - f0 < rows ? p.frames - f0 : rows;
    const int64_t valid = p.lengths != nullptr ? p.lengths[b] : p.frames;
    T* code = static_cast<T*>(thread_scratch(kCode, static_cast<size_t>(rows * code_ld) * sizeof(T)));
    T* out = static_cast<T*>(thread_scratch(kOutput, static_cast<size_t>(rows * channel_ld) * sizeof(T)));
    memset(code, 0, static_cast<size_t>(count * code_ld) * sizeof(T));
    for (int64_t stage = 0; stage < p.used; ++stage)
      for (int64_t f = 0; f < count && f0 + f < valid; ++f) {
        const int64_t position = (b * p.used + stage) * p.frames + f0 + f;
        int64_t entry = p.codes[position];
        if (entry < 0 || entry >= layout.entries) {
          note_error(p.error, position);
          entry = 0;
        }
        const T* row = packed + layout.rows() + (stage * layout.entries + entry) * dim;
        for (int64_t d = 0; d < dim; ++d) code[f * code_ld + stage * dim + d] = row[d];
      }
    // Stage by stage, as the definition adds: one chain over all of Q D rounds three times as much.
    const GemmOperand<T> projection{code, code_ld, dim, layout.stages, dim, dim};
    conv_gemm<T>(count, projection, packed + layout.out_panels(), layout.channels, out, channel_ld);
    const T* bias = packed + layout.out_bias() + (p.used - 1) * channel_ld;
    for (int64_t f = 0; f < count; ++f)
      for (int64_t c = 0; c < channel_ld; c += kLanes<T>)
        vstore<T>(out + f * channel_ld + c, vload<T>(out + f * channel_ld + c) + vload<T>(bias + c));
    if (p.addend.data != nullptr) {
      T* extra = static_cast<T*>(thread_scratch(kAddend, static_cast<size_t>(rows * channel_ld) * sizeof(T)));
      load_tile<T>(extra, channel_ld, count, layout.channels, p.addend, b, f0, valid);
      for (int64_t i = 0; i < count * channel_ld; i += kLanes<T>)
        vstore<T>(out + i, vload<T>(out + i) + vload<T>(extra + i));
    }
    store_tile<T>(out, channel_ld, count, layout.channels, p.y, b, f0, valid);
  });
}

}  // namespace

void rvq_lookup(const RvqLookupParams& p) {
  if (p.is_double)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
