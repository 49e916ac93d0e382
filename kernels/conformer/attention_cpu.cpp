// One parallel task per (clip, head, stretch of queries). It packs its head's keys and values as the right-hand sides
// of two GEMMs, then runs block after block of queries through scores, softmax and the sum of values, all in L2. A
// query's result depends on no other query: not on the block, the stretch or the thread.
#include "params.h"

#include "../common/activation.h"
#include "../common/gemm.h"
#include "../common/tile_io.h"

namespace dcx {
namespace DCX_NS {
namespace {

// Scores and probabilities of a block of queries, in bytes: beside keys and values well inside a 1 MB L2.
constexpr int64_t kBlockBytes = 400 * 1024;
// Whole register blocks of the GEMMs, 13 and 9 rows high with 512-bit registers.
constexpr int64_t kMostRows = 117, kRowBlock = 13;
// Added to the score of an invalid step: far below any score, and finite, so that a clip without a valid step has the
// mean of its values.
constexpr float kInvalid = -3e38f;
constexpr float kOutside = -__builtin_inff();

enum Slot { kTile = 0, kKeys = 1, kValues = 2, kDistances = 3, kScores = 4, kWeights = 5, kHeard = 6, kPlaces = 7 };

inline void pack_element(float* out, const float* at, const float*) { *out = *at; }
inline void pack_element(Bf16Pair* out, const float* low, const float* high) {
  out->bits = static_cast<uint32_t>(float_to_bf16(*low)) | static_cast<uint32_t>(float_to_bf16(*high)) << 16;
}
inline void pack_element(Bf16Pair* out, const Bf16* low, const Bf16* high) {
  out->bits = static_cast<uint32_t>(low->bits) | static_cast<uint32_t>(high->bits) << 16;
}

// gemm_pack.h's panels of a matrix [reduction][columns] that lies in a tile, whose elements past it are zero.
template <class Kind>
void pack(typename Kind::Weight* out, const typename Kind::Tile* tile, int64_t reduction, int64_t columns,
          int64_t step_stride, int64_t column_stride) {
  constexpr int64_t kStep = kChannelsPerElement<typename Kind::Weight>;
  for (int64_t panel = 0; panel < panel_count(columns); ++panel) {
    const int64_t begin = panel_begin(columns, panel), end = panel_begin(columns, panel + 1);
    for (int64_t k = 0; k < reduction; k += kStep)
      for (int64_t n = begin; n < end; ++n, ++out) {
        const typename Kind::Tile* at = tile + k * step_stride + n * column_stride;
        pack_element(out, at, at + (kStep - 1) * step_stride);
      }
  }
}

// Softmax's numerators in place of scores, and their sum. `places`: the products with the distances, the first and the
// last one, at `last`, repeated for a register beyond either end; key 0's is at `at`.
template <class Tile>
float numerators(Tile* out, float* scores, int64_t count, const float* places, int64_t at, int64_t last,
                 const float* penalty, float scale) {
  constexpr int64_t kWide = kLanes<float>;
  Vec<float> most = vset1(kOutside);
  for (int64_t j = 0; j < count; j += kWide, at += kWide) {
    const int64_t place = at < -kWide ? -kWide : at > last ? last : at;
    const Vec<float> product = vload<float>(scores + j) + vload<float>(places + place);
    const Vec<float> score = vfma(product, vset1(scale), vload<float>(penalty + j));
    vstore<float>(scores + j, score);
    most = score > most ? score : most;
  }
  float lanes[kWide];
  vstore<float>(lanes, most);
  float largest = lanes[0];
  for (int64_t i = 1; i < kWide; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  const Vec<float> lowest = vset1(-87.0f), zero{};
  Vec<float> sum{};
  for (int64_t j = 0; j < count; j += kWide) {
    const Vec<float> x = vload<float>(scores + j) - vset1(largest);
    const Vec<float> power = exp_below_zero(x < lowest ? lowest : x);
    const Vec<float> numerator = x < lowest ? zero : power;
    vstore_tile(out + j, numerator);
    sum = sum + numerator;
  }
  return vsum<float>(sum);
}

template <class Kind>
void run(const ConformerAttentionParams& p) {
  typedef typename Kind::Tile Tile;
  typedef typename Kind::Weight Weight;
  constexpr int64_t kWide = kLanes<float>;
  const int64_t size = round_up(p.size, kColumnUnit), keys = round_up(p.steps, kColumnUnit);
  const int64_t distances = p.left + 1 + p.right, padded = round_up(distances, kColumnUnit);
  int64_t rows =
      within_l2(kBlockBytes) / (keys * static_cast<int64_t>(sizeof(float) + sizeof(Tile))) / kRowBlock * kRowBlock;
  rows = rows < kRowBlock ? kRowBlock : rows > kMostRows ? kMostRows : rows;
  // Every stretch packs the keys again, so there are no more of them than keep the threads busy.
  const int64_t wanted = ceil_div(int64_t{2} * runtime().num_threads(), p.batch * p.heads);
  const int64_t most = ceil_div(p.steps, rows);
  const int64_t stretches = wanted < most ? wanted : most;

  parallel(p.batch * p.heads * stretches, p.batch * p.heads * p.steps * p.steps * p.size, [&](int64_t task) {
    const int64_t b = task / stretches / p.heads, head = task / stretches % p.heads, stretch = task % stretches;
    const int64_t begin = p.steps * stretch / stretches, end = p.steps * (stretch + 1) / stretches;
    const int64_t channel = head * p.size;
    Weight* key = scratch_rows<Weight>(kKeys, weight_steps<Kind>(size), keys);
    Weight* value = scratch_rows<Weight>(kValues, weight_steps<Kind>(keys), size);
    Weight* distance = scratch_rows<Weight>(kDistances, weight_steps<Kind>(size), padded);
    Tile* tile = scratch_rows<Tile>(kTile, keys > padded ? keys : padded, size);
    load_tile<Tile>(tile, size, padded, p.size, p.distances, 0, 0, distances);
    pack<Kind>(distance, tile, size, distances, 1, size);
    load_tile<Tile>(tile, size, keys, p.size, view_from(p.v, channel), b, 0, p.steps);
    pack<Kind>(value, tile, p.steps, size, size, 1);
    load_tile<Tile>(tile, size, keys, p.size, view_from(p.k, channel), b, 0, p.steps);
    pack<Kind>(key, tile, size, p.steps, 1, size);

    float* scores = scratch_rows<float>(kScores, rows, keys);
    Tile* weights = scratch_rows<Tile>(kWeights, rows, keys);
    float* heard = scratch_rows<float>(kHeard, rows, size);
    // Products with the distances of the block, one row with its ends repeated, and what is added to scores.
    float* products = scratch_rows<float>(kPlaces, 1, rows * padded + padded + 2 * kWide + keys);
    float* ends = products + rows * padded;
    float* penalty = ends + padded + 2 * kWide;
    for (int64_t j = 0; j < keys; ++j)
      penalty[j] = j >= p.steps ? kOutside : p.valid != nullptr && p.valid[b * p.steps + j] == 0 ? kInvalid : 0.0f;

    for (int64_t t = begin; t < end; t += rows) {
      const int64_t count = end - t < rows ? end - t : rows;
      load_tile<Tile>(tile, size, count, p.size, view_from(p.q, channel), b, t, p.steps);
      const GemmOperand<Tile> query{tile, size, 0, 1, size};
      conv_gemm<Tile, Weight>(count, query, key, p.steps, scores, keys);
      conv_gemm<Tile, Weight>(count, query, distance, distances, products, padded);
      float scales[kMostRows];
      for (int64_t r = 0; r < count; ++r) {
        const float* product = products + r * padded;
        for (int64_t i = 0; i < kWide; ++i) {
          ends[i] = product[0];
          ends[kWide + distances + i] = product[distances - 1];
        }
        memcpy(ends + kWide, product, static_cast<size_t>(distances) * sizeof(float));
        scales[r] = 1.0f / numerators(weights + r * keys, scores + r * keys, keys, ends + kWide, p.left - (t + r),
                                      distances - 1, penalty, p.scale);
      }
      conv_gemm<Tile, Weight>(count, GemmOperand<Tile>{weights, keys, 0, 1, p.steps}, value, size, heard, size);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < size; c += kWide)
          vstore<float>(heard + r * size + c, vload<float>(heard + r * size + c) * vset1(scales[r]));
      store_tile<float>(heard, size, count, p.size, view_from(p.y, channel), b, t, p.steps);
    }
  });
}

}  // namespace

void conformer_attention(const ConformerAttentionParams& p) {
  if (p.q.dtype == DType::kBF16)
    run<Bf16Kind>(p);
  else
    run<SingleKind>(p);
}

}  // namespace DCX_NS
}  // namespace dcx
