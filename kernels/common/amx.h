// Intel AMX's tiles: eight registers of up to 16 rows of 64 bytes, and the product of two of bfloat16 into one of
// floats. Written as instructions: the compilers' own names for them take macros, no template arguments, and some let
// stores pass a load.
#pragma once
#include <stdint.h>

namespace dcx {
namespace DCX_NS {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

#ifdef DCX_AVX512_EMULATED  // by tests/cpp/avx512_emulated.h
using dcx_emulated::add_product;
using dcx_emulated::release_tiles;
using dcx_emulated::tile_load;
using dcx_emulated::tile_store;
using dcx_emulated::tile_zero;
static inline void load_tile_shapes(const TileShapes& shapes) { dcx_emulated::load_tile_shapes(&shapes); }
#else
static inline void load_tile_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
// Until then every switch of the thread saves the tiles.
static inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int tile>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows `stride` bytes apart.
template <int tile>
static inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
static inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
// sum += a b, a of rows of pairs, b of a row of pairs for every pair of a's: per element the products of the pairs'
// first halves and those of their second halves are added up in order, each from zero, the two sums are added, and that
// to sum.
template <int sum, int a, int b>
static inline void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}
#endif

}  // namespace DCX_NS
}  // namespace dcx
