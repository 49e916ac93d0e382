// One parallel task per stretch of rows; a row stays in L1 from the sum to the normed row.
#include "params.h"

#include "../common/layer_norm.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

constexpr int64_t kRows = 16;

enum Slot { kRow = 0, kAddend = 1 };

}  // namespace

void conformer_norm(const ConformerNormParams& p) {
  const int64_t ld = round_up(p.channels, kColumnUnit);
  parallel(ceil_div(p.rows, kRows), p.rows * p.channels * 8, [&](int64_t task) {
    float* row = scratch_rows<float>(kRow, 1, ld);
    float* addend = scratch_rows<float>(kAddend, 1, ld);
    memset(row, 0, static_cast<size_t>(ld) * sizeof(float));
    const int64_t end = (task + 1) * kRows < p.rows ? (task + 1) * kRows : p.rows;
    for (int64_t r = task * kRows; r < end; ++r) {
      float* x = p.x + r * p.channels;
      memcpy(row, x, static_cast<size_t>(p.channels) * sizeof(float));
      if (p.addend.data != nullptr) {
        load_tile<float>(addend, ld, 1, p.channels, p.addend, 0, r, p.rows);
        for (int64_t c = 0; c < ld; c += kLanes<float>)
          vstore<float>(row + c, vfma(vload<float>(addend + c), vset1(p.alpha), vload<float>(row + c)));
      }
      if (p.next_weight != nullptr) layer_norm_row<float>(row, p.channels, ld, p.weight, p.bias, p.eps);
      if (p.next_weight != nullptr || p.addend.data != nullptr)
        memcpy(x, row, static_cast<size_t>(p.channels) * sizeof(float));
      layer_norm_row<float>(row, p.channels, ld, p.next_weight != nullptr ? p.next_weight : p.weight,
                            p.next_weight != nullptr ? p.next_bias : p.bias, p.eps);
      store_tile<float>(row, ld, 1, p.channels, p.y, 0, r, p.rows);
    }
  });
}

}  // namespace DCX_NS
}  // namespace dcx
