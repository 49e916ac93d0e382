// conv_gemm's panels on AMX: 16 steps of a panel, as they lie in memory, are a register of 16 pairs x 16 columns, and
// rows of a tile, as they lie there, one of 16 rows x 16 pairs. For gemm_cpu.cpp.
#pragma once
#include "amx.h"
#include "bf16.h"

namespace dcx {
namespace DCX_NS {

// Reduction length, in channels, after which sums go to C, to come back for the rest: a panel's weights of it, 36 KB,
// stay in L1 while the rows pass. No bit depends on it, since products are added to what a register holds.
constexpr int64_t kTileBlock = 384;
// Steps of one product.
constexpr int64_t kTileSteps = 16;

// The registers' use and shapes: sums and the rows of A for blocks of so many rows, and A's and B's of the `rest` steps
// behind the last whole product. Shapes stay until others are asked for, and are given up with the object.
class TileRegisters {
 public:
  static constexpr int kA = 4, kB = 5, kRestA = 6, kRestB = 7;  // in front of them the sums

  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (rows_ > 0) release_tiles();
  }

  void shape(int64_t rows, int64_t rest) {
    if (rows == rows_ && rest == rest_) return;
    rows_ = rows;
    rest_ = rest;
    TileShapes shapes;
    for (int i = 0; i <= kA; ++i) shapes.set(i, rows, kTileRowBytes);
    shapes.set(kB, kTileSteps, kTileRowBytes);
    if (rest > 0) {
      shapes.set(kRestA, rows, 4 * rest);
      shapes.set(kRestB, rest, kTileRowBytes);
    }
    load_tile_shapes(shapes);
  }

 private:
  int64_t rows_ = 0, rest_ = 0;
};

// One panel over one block of the reduction.
struct TilePanel {
  const Bf16* a;
  int64_t row_stride, tap_stride, taps, steps;
  const Bf16Pair* b;
  int64_t width;  // of the panel: from one of b's steps to the next
  bool add;       // to what c holds
};

// RT x NT registers of sums, one after the other.
template <int RT, int NT, int I, bool kStore>
inline void move_sums(float* c, int64_t ld_c, bool zero) {
  float* at = c + I / NT * kTileRows * ld_c + I % NT * kColumnUnit;
  if (kStore)
    tile_store<I>(at, 4 * ld_c);
  else if (zero)
    tile_zero<I>();
  else
    tile_load<I>(at, 4 * ld_c);
  if constexpr (I + 1 < RT * NT) move_sums<RT, NT, I + 1, kStore>(c, ld_c, zero);
}

// The products of RT registers of rows and NT of columns, to and fro, so that a turn needs no new columns.
template <int RT, int NT, int A, int B, int I = 0>
inline void tile_products(const Bf16* a, int64_t row_stride, const Bf16Pair* b, int64_t width) {
  constexpr int row = I / NT, column = row % 2 == 0 ? I % NT : NT - 1 - I % NT;
  if (I % NT == 0) tile_load<A>(a + row * kTileRows * row_stride, 2 * row_stride);
  if (I % NT > 0 || I == 0) tile_load<B>(b + column * kColumnUnit, 4 * width);
  add_product<row * NT + column, A, B>();
  if constexpr (I + 1 < RT * NT) tile_products<RT, NT, A, B, I + 1>(a, row_stride, b, width);
}

template <int RT, int NT>
inline void tile_block(const TilePanel& p, const Bf16* a, const Bf16Pair* b, float* c, int64_t ld_c) {
  typedef TileRegisters R;
  static_assert(RT * NT <= R::kA);
  const int64_t whole = p.steps / kTileSteps, rest = p.steps % kTileSteps;
  move_sums<RT, NT, 0, false>(c, ld_c, !p.add);
  for (int64_t k = 0; k < p.taps; ++k) {
    const Bf16* from = a + k * p.tap_stride;
    for (int64_t i = 0; i < whole; ++i) {
      tile_products<RT, NT, R::kA, R::kB>(from, p.row_stride, b, p.width);
      from += 2 * kTileSteps;
      b += kTileSteps * p.width;
    }
    if (rest > 0) {
      tile_products<RT, NT, R::kRestA, R::kRestB>(from, p.row_stride, b, p.width);
      b += rest * p.width;
    }
  }
  move_sums<RT, NT, 0, true>(c, ld_c, false);
}

// NT registers of the panel's columns from `column` on. fetch(n) is called in front of n blocks of kTileRows rows.
template <int RT, int NT, class Fetch>
inline void tile_columns(int64_t m, const TilePanel& p, int64_t column, float* c, int64_t ld_c,
                         TileRegisters& registers, const Fetch& fetch) {
  const int64_t rest = p.steps % kTileSteps;
  for (int64_t row = 0, rows; row < m; row += rows) {
    const bool full = m - row >= RT * kTileRows;
    rows = full ? RT * kTileRows : m - row < kTileRows ? m - row : kTileRows;
    fetch(ceil_div(rows, int64_t{kTileRows}));
    registers.shape(rows < kTileRows ? rows : kTileRows, rest);
    const Bf16* a = p.a + row * p.row_stride;
    if (full)
      tile_block<RT, NT>(p, a, p.b + column, c + row * ld_c + column, ld_c);
    else
      tile_block<1, NT>(p, a, p.b + column, c + row * ld_c + column, ld_c);
  }
}

template <class Fetch>
inline void tile_panel(int64_t m, const TilePanel& p, float* c, int64_t ld_c, TileRegisters& registers,
                       const Fetch& fetch) {
  static_assert(kMaxPanelWidth == 3 * kColumnUnit);
  if (p.width == 3 * kColumnUnit)
    tile_columns<1, 3>(m, p, 0, c, ld_c, registers, fetch);
  else if (p.width == 2 * kColumnUnit)
    tile_columns<2, 2>(m, p, 0, c, ld_c, registers, fetch);
  else
    tile_columns<4, 1>(m, p, 0, c, ld_c, registers, fetch);
}

}  // namespace DCX_NS
}  // namespace dcx
