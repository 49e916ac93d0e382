// One parallel task per (stretch of rows, chunk of columns). A few rows run through the chunk's panels of weights, then
// bias, swish and the sum follow while their products lie in L1. A stretch's rows stay in L2 while the chunks pass, and
// a panel while a stretch's rows do. A row's result depends on no other row: not on the stretch or the thread.
#include "params.h"

#include "../common/activation.h"
#include "../common/gemm.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

// How much of the reduction is summed in registers. Of bfloat16 a whole row of 1024: the inputs' own rounding outweighs
// what longer chains of float32 round, and their way to memory and back takes a few percent of the rate.
template <class Tile>
constexpr int64_t kReduction = sizeof(Tile) == 2 ? 1024 : 256;
// At a time, in register blocks of 9; or in AMX's of 16, for which a block of the panel comes from L2 once.
template <class Tile>
constexpr int64_t kRows = DCX_ISA >= 4 && sizeof(Tile) == 2 ? 96 : 27;
constexpr int64_t kFewestRows = 72;  // of a stretch: with fewer a panel would be read for too little
constexpr int64_t kChunkPanels = 2;  // 96 columns are whole lines of bfloat16, which two tasks needn't share

enum Slot { kTile = 0, kSums = 1 };

// Rows of x as Tile, and how far apart they lie.
template <class Tile>
inline const Tile* rows_at(const ConformerLinearParams& p, int64_t row, int64_t count, int64_t* stride) {
  *stride = p.channels;
  if constexpr (sizeof(Tile) == 2) return static_cast<const Tile*>(p.x) + row * p.channels;
  if (p.dtype == DType::kF32) return static_cast<const Tile*>(p.x) + row * p.channels;
  Tile* tile = scratch_rows<Tile>(kTile, count, p.channels);
  load_rows<LoadBF16>(tile, p.channels, count, p.channels, static_cast<const uint16_t*>(p.x) + row * p.channels, 1,
                      p.channels);
  return tile;
}

inline Vec<float> finished(const ConformerLinearParams& p, const float* sums, int64_t column) {
  const Vec<float> z = p.bias == nullptr ? vload<float>(sums) : vload<float>(sums) + vload<float>(p.bias + column);
  return p.swish ? swish(z) : z;
}

template <class Kind, class Out>
void run(const ConformerLinearParams& p) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Weight Weight;
  const int64_t panels = panel_count(p.columns), chunks = ceil_div(panels, kChunkPanels);
  const int64_t threads = runtime().num_threads(), most = p.rows / kFewestRows;
  const int64_t stretches = most < 1 ? 1 : threads < most ? threads : most;
  parallel(stretches * chunks, p.rows * p.columns * p.channels, [&](int64_t task) {
    const int64_t stretch = task / chunks, chunk = task % chunks;
    const int64_t begin = p.rows * stretch / stretches, end = p.rows * (stretch + 1) / stretches;
    const int64_t first = panels * chunk / chunks, last = panels * (chunk + 1) / chunks;
    const int64_t n0 = panel_begin(p.columns, first), width = panel_begin(p.columns, last) - n0;
    float* sums = scratch_rows<float>(kSums, kRows<Tile>, width);
    for (int64_t t = begin; t < end; t += kRows<Tile>) {
      const int64_t count = end - t < kRows<Tile> ? end - t : kRows<Tile>;
      int64_t stride = 0;
      const Tile* x = rows_at<Tile>(p, t, count, &stride);
      for (int64_t panel = first; panel < last; ++panel)
        conv_gemm_panel<Tile, Weight>(count, {x, stride, 0, 1, p.channels, kReduction<Tile>},
                                      static_cast<const Weight*>(p.weight), p.columns, panel,
                                      sums + panel_begin(p.columns, panel) - n0, width);
      for (int64_t r = 0; r < count; ++r) {
        const float* from = sums + r * width;
        if (p.y != nullptr) {
          Out* y = static_cast<Out*>(p.y) + (t + r) * p.columns + n0;
          for (int64_t c = 0; c < width; c += kLanes<float>) vstore_tile(y + c, finished(p, from + c, n0 + c));
        } else {
          float* sum = p.sum + (t + r) * p.columns + n0;
          for (int64_t c = 0; c < width; c += kLanes<float>)
            vstore<float>(sum + c, vfma(finished(p, from + c, n0 + c), vset1(p.alpha), vload<float>(sum + c)));
        }
      }
    }
  });
}

}  // namespace

void conformer_linear(const ConformerLinearParams& p) {
  if (p.dtype == DType::kBF16)
    run<Bf16Kind, Bf16>(p);
  else
    run<SingleKind, float>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
