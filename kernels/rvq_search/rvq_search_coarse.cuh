// rvq_search for D = 8 and many frames: codes[b, i, f] as rvq_search.cuh has them, bit for bit, found in two steps. A
// block owns 16 frames, the rows of one tensor-core product. Products of bytes (layout.h, exact) give every entry's
// coarse sum; a thread keeps the largest of each eight entries. Eights whose largest comes within a proven slack of the
// frame's best are scored in float32, by rvq_search.cuh's operations in its order; lowest (score, index) wins.
// README.md has the slack. A warp owns each kWarps-th 256 entries, whose bytes are in its registers one step ahead;
// between stages it takes a frame to its next query.
#pragma once
#include "rvq_search_parts.cuh"

namespace dcx {

// Where the parts of `packed` lie is worked out by the host: it would take a kernel's registers.
struct RvqSearchCoarseLaunch {
  RvqSearchParams p;
  int slots;           // as RvqSearchLaunch's
  int passes, groups;  // of 256 and of 16 entries
  int stages, entries;
  const float *books, *rows, *cross, *errors;
  const uint32_t* coarse;  // coarse_books

  template <class K>
  static RvqSearchCoarseLaunch of(const RvqSearchParams& p) {
    const RvqLayout& layout = p.layout;
    const float* packed = static_cast<const float*>(p.packed);
    return {p,
            slots_of<K>(p),
            static_cast<int>(layout.coarse_passes()),
            static_cast<int>(layout.groups()),
            static_cast<int>(layout.stages),
            static_cast<int>(layout.entries),
            packed + layout.books(),
            packed + layout.rows(),
            packed + layout.cross(),
            packed + layout.coarse_errors(),
            reinterpret_cast<const uint32_t*>(packed + layout.coarse_books())};
  }
};

template <int kBlockThreads>
struct RvqSearchCoarse {
  using Params = RvqSearchCoarseLaunch;
  using Words = Vector16<uint32_t>;
  static constexpr int kDim = 8;
  static constexpr int kFrames = 16;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinBlocks = 512 / kThreads;
  static constexpr bool kNeedsSm80 = true;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kSlots = 16;             // eights whose largest sum a thread keeps, of all its passes
  static constexpr int kSumPitch = kWarps + 4;  // lanes that read a frame each then share no bank
  static constexpr float kScale = kCoarseScale;
  static constexpr int kGroupFloats = (kDim + 1) * kCodeGroup;
  static constexpr int kPassWords = kCoarseRows * kDim / 16;
  // Sums stay within 2^20 of zero. A slack of kAll keeps every eight, one of -kAll none.
  static constexpr int32_t kAll = 1 << 29, kLowest = -(1 << 30);
  using ProjectIn = RvqProjectIn<kFrames, kThreads>;

  struct Shared {
    FrameTile<kFrames>* tile;
    int64_t* winner;   // [kFrames]: key_of the best entry so far
    float* query;      // [kFrames][D]: -2 e / |e|
    uint32_t* bytes;   // [kFrames][2]: 127 e / |e| in signed bytes
    int32_t* slack;    // [kFrames]: of the coarse sums
    int32_t* largest;  // [kFrames][kSumPitch]: the largest coarse sum of each warp
    float* work;       // z and its partial sums, then output columns
    float* code;       // [used D][kFrames]: e of the stages to come, the chosen rows of those before
  };

  // All of a fixed size but code, so that every place is a constant.
  static constexpr int64_t kWinnerAt = static_cast<int64_t>(sizeof(FrameTile<kFrames>));
  static constexpr int64_t kQueryAt = kWinnerAt + kFrames * 8;
  static constexpr int64_t kBytesAt = kQueryAt + kFrames * kDim * 4;
  static constexpr int64_t kSlackAt = kBytesAt + kFrames * 8;
  static constexpr int64_t kLargestAt = kSlackAt + kFrames * 4;
  static constexpr int64_t kWorkAt = kLargestAt + kFrames * kSumPitch * 4;
  static constexpr int64_t kOutBytes = int64_t{kThreads} * kFramePitch<kFrames> * 4;
  static constexpr int64_t kCodeAt =
      kWorkAt + (ProjectIn::smem_bytes() > kOutBytes ? ProjectIn::smem_bytes() : kOutBytes);
  static int64_t smem_bytes(const RvqSearchParams& p) { return kCodeAt + p.used * kDim * kFrames * 4; }
  static DCX_DEVICE Shared carve(unsigned char* smem) {
    Shared s;
    s.tile = reinterpret_cast<FrameTile<kFrames>*>(smem);
    s.winner = reinterpret_cast<int64_t*>(smem + kWinnerAt);
    s.query = reinterpret_cast<float*>(smem + kQueryAt);
    s.bytes = reinterpret_cast<uint32_t*>(smem + kBytesAt);
    s.slack = reinterpret_cast<int32_t*>(smem + kSlackAt);
    s.largest = reinterpret_cast<int32_t*>(smem + kLargestAt);
    s.work = reinterpret_cast<float*>(smem + kWorkAt);
    s.code = reinterpret_cast<float*>(smem + kCodeAt);
    return s;
  }

  // Orders as (score, entry) does; both zeros are equal.
  static DCX_DEVICE int64_t key_of(float score, int entry) {
    const uint32_t bits = bits_of(score + 0.0f);
    const int32_t order = static_cast<int32_t>((bits >> 31) != 0 ? bits ^ 0x7fffffffu : bits);
    return (int64_t{order} << 32) | entry;
  }
  static DCX_DEVICE int64_t no_key() { return key_of(infinity(), 0); }

  // One thread makes a frame's query, its bytes and their slack. Broken frames have code 0 and frames that don't count
  // are not asked for: no eight of theirs is scored.
  static DCX_DEVICE void aim(const Params& params, const Shared& s, int stage, int f) {
    const float row_error = params.errors[stage];
    float query[kDim];
    if (!make_query<kDim, kFrames>(query, s.code + stage * kDim * kFrames + f, kDim)) s.tile->broken[f] = 1;
    store_frames(s.query + f * kDim, query);
    uint32_t words[2] = {0, 0};
    float square = 0.0f;
    DCX_UNROLL
    for (int d = 0; d < kDim; ++d) {
      const float exact = -0.5f * kScale * query[d], rounded = rintf(exact), off = exact - rounded;
      words[d / 4] |= (static_cast<uint32_t>(static_cast<int32_t>(rounded)) & 255u) << (8 * (d % 4));
      square = fused_multiply_add(off, off, square);
    }
    s.bytes[2 * f] = words[0];
    s.bytes[2 * f + 1] = words[1];
    const float error = sqrtf(square) * 1.00001f + 1e-4f;  // of the bytes, kScale times
    const float dots = 2.0f * kScale * (error * 1.00001f + (1.00001f * kScale + error) * row_error);
    const float slack = dots * 1.00001f + 2.0f;  // 1 for 127^2 times the errors of the scores, 1 for the whole number
    const bool asked = s.tile->broken[f] == 0 && s.tile->counts[f] != 0;
    s.slack[f] = !asked ? -kAll : slack < static_cast<float>(kAll) ? static_cast<int32_t>(slack) : kAll;
    s.winner[f] = no_key();
  }

  // The bytes of 256 entries, the next that a warp takes: of stage after stage, each kWarps-th pass.
  struct Ahead {
    Words rows[4];
    int stage, pass;

    // Lane l's word i, w has row h = l % 2 of two: coordinates 4 h to 4 h + 3 of the entry at place
    // 8 (l / 16) + 2 i + l / 2 % 2 of group 4 (l / 4 % 4) + w of the pass.
    DCX_DEVICE void issue(const Params& params) {
      if (pass >= params.passes) {
        pass = thread_index() / kWarp;
        ++stage;
      }
      if (stage >= params.p.used || pass >= params.passes) return;
      const int lane = thread_index() % kWarp;
      const auto* words = reinterpret_cast<const Words*>(params.coarse) +
                          (int64_t{stage} * params.passes + pass) * kPassWords + lane / 16 * 64 + lane / 2 % 2 * 8 +
                          lane % 2 * 4 + lane / 4 % 4;
      DCX_UNROLL
      for (int i = 0; i < 4; ++i) rows[i] = words[16 * i];
      pass += kWarps;
    }
  };

  // best[4 w + k]: of frame g (k < 2) or g + 8, in group 8 (t % 2) + 4 (k % 2) + w of a pass, places 8 (t / 2) to
  // 8 (t / 2) + 7, with g = lane / 4 and t = lane % 4. Only half of a product's depth is used at a time, so that a word
  // of a lane is half an entry.
  static DCX_DEVICE void search(const Params& params, const Shared& s, Ahead& ahead, int32_t (&best)[kSlots]) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, g = lane / 4, t = lane % 4;
    const uint32_t low = s.bytes[2 * g + t % 2], high = s.bytes[2 * (g + 8) + t % 2];
    const uint32_t even[2] = {t < 2 ? low : 0u, t < 2 ? high : 0u}, odd[2] = {t < 2 ? 0u : low, t < 2 ? 0u : high};
    DCX_UNROLL
    for (int i = 0; i < kSlots; ++i) best[i] = kLowest;
    DCX_NO_UNROLL
    for (int pass = warp; pass < params.passes; pass += kWarps) {
      Words rows[4];
      DCX_UNROLL
      for (int i = 0; i < 4; ++i) rows[i] = ahead.rows[i];
      ahead.issue(params);
      DCX_UNROLL
      for (int i = 0; i < 4; ++i) DCX_UNROLL
      for (int w = 0; w < 4; ++w) {
        int32_t a[4], b[4];
        mma_16x8x16_bytes(a, even, rows[i].values[w]);
        mma_16x8x16_bytes(b, odd, rows[i].values[w]);
        DCX_UNROLL
        for (int k = 0; k < 4; ++k) best[4 * w + k] = maximum(maximum(best[4 * w + k], a[k]), b[k]);
      }
    }
    int32_t largest[2] = {kLowest, kLowest};
    DCX_UNROLL
    for (int i = 0; i < kSlots; ++i) largest[i / 2 % 2] = maximum(largest[i / 2 % 2], best[i]);
    // Neighbours halve the frames between them.
    const int32_t given = shuffle_xor(t % 2 == 0 ? largest[1] : largest[0], 1);
    int32_t kept = maximum(t % 2 == 0 ? largest[0] : largest[1], given);
    kept = maximum(kept, shuffle_xor(kept, 2));
    if (t < 2) s.largest[(g + 8 * t) * kSumPitch + warp] = kept;
  }

  // The least coarse sum of frame f that stays in the running; lanes t = 0 to 3 of a frame share the work.
  static DCX_DEVICE int32_t limit_of(const Shared& s, int f) {
    int32_t best = kLowest;
    DCX_UNROLL
    for (int i = 0; i < kWarps; i += 4) best = maximum(best, s.largest[f * kSumPitch + i + thread_index() % 4]);
    best = maximum(best, shuffle_xor(best, 1));
    return maximum(best, shuffle_xor(best, 2)) - s.slack[f];
  }

  // Scores the eights of an item, slot `item % kSlots` of lane item / kSlots, in every pass of the warp: four lanes to
  // an item, two entries to a lane. -1: none.
  static DCX_DEVICE void score(const Params& params, const Shared& s, int stage, int item) {
    struct alignas(8) Two {
      float values[2];
    };
    const int lane = thread_index() % kWarp, owner = maximum(item, 0) / kSlots, slot = maximum(item, 0) % kSlots;
    const int f = owner / 4 + slot / 2 % 2 * 8, place = owner % 4 / 2 * 8 + lane % 4 * 2;
    const float* books = params.books + int64_t{stage} * params.groups * kGroupFloats + place;
    float query[kDim];
    load_frames(query, s.query + f * kDim);
    int64_t key = no_key();
    DCX_NO_UNROLL
    for (int pass = thread_index() / kWarp; pass < params.passes; pass += kWarps) {
      const int group = pass * static_cast<int>(kCoarseGroups) + owner % 2 * 8 + slot % 2 * 4 + slot / 4;
      if (item < 0 || group >= params.groups) continue;
      const auto* book = reinterpret_cast<const Two*>(books + int64_t{group} * kGroupFloats);
      Two values[kDim + 1];
      DCX_UNROLL
      for (int d = 0; d <= kDim; ++d) values[d] = book[d * (kCodeGroup / 2)];
      DCX_UNROLL
      for (int k = 0; k < 2; ++k) {
        float sum = values[0].values[k];
        DCX_UNROLL
        for (int d = 0; d < kDim; ++d) sum = fused_multiply_add(query[d], values[d + 1].values[k], sum);
        if (sum < infinity()) key = minimum(key, key_of(sum, group * int{kCodeGroup} + place + k));
      }
    }
    key = minimum(key, shuffle_xor(key, 1));
    key = minimum(key, shuffle_xor(key, 2));
    if (lane % 4 == 0 && key < no_key()) atomic_min(s.winner + f, key);
  }

  // Deals the eights that stay in the running out to the warp's lanes, eight at a time.
  static DCX_DEVICE void choose(const Params& params, const Shared& s, int stage, const int32_t (&best)[kSlots]) {
    const int lane = thread_index() % kWarp;
    const int32_t limits[2] = {limit_of(s, lane / 4), limit_of(s, lane / 4 + 8)};
    uint32_t own = 0;
    DCX_UNROLL
    for (int i = 0; i < kSlots; ++i) own |= best[i] >= limits[i / 2 % 2] ? 1u << i : 0u;
    uint32_t lanes = ballot(own != 0), slots = 0;  // of `owner`
    int owner = 0;
    DCX_NO_UNROLL
    while ((lanes | slots) != 0) {
      int item = -1;
      DCX_NO_UNROLL
      for (int i = 0; i < kWarp / 4 && (lanes | slots) != 0; ++i) {
        if (slots == 0) {
          owner = lowest_bit(lanes);
          lanes &= lanes - 1;
          slots = shuffle(own, owner);
        }
        if (i == lane / 4) item = owner * kSlots + lowest_bit(slots);
        slots &= slots - 1;
      }
      score(params, s, stage, item);
    }
  }

  // A warp writes a frame's code and takes the chosen row off the later stages' e.
  static DCX_DEVICE void finish(const Params& params, const Shared& s, int stage, int f) {
    const RvqSearchParams& p = params.p;
    const int lane = thread_index() % kWarp, columns = (static_cast<int>(p.used) - stage - 1) * kDim;
    const int entry = static_cast<int>(s.winner[f] & 0xffffffff);
    const float* row = params.rows + (int64_t{stage} * params.entries + entry) * kDim;
    const float* cross = params.cross + (int64_t{stage + 1} * params.stages + stage) * (kDim * kDim);
    float weights[2][kDim], chosen[kDim];  // of two columns: all loads are under way before one is waited for
    const auto load = [&](int first) {
      DCX_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = minimum(first + i * kWarp, columns - 1);
        load_frames(weights[i], cross + (int64_t{column / kDim} * params.stages * kDim + column % kDim) * kDim);
      }
    };
    if (lane < columns) load(lane);
    load_frames(chosen, row);
    const float own = row[lane % kDim];
    DCX_NO_UNROLL
    for (int first = lane; first < columns; first += 2 * kWarp) {
      if (first > lane) load(first);
      DCX_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = first + i * kWarp;
        float off = 0.0f;
        DCX_UNROLL
        for (int k = 0; k < kDim; ++k) off = fused_multiply_add(weights[i][k], chosen[k], off);
        float* e = s.code + ((stage + 1) * kDim + column) * kFrames + f;
        if (column < columns) *e = *e - off;
      }
    }
    if (lane < kDim) s.code[(stage * kDim + lane) * kFrames + f] = own;
    if (lane == 0 && s.tile->exists[f])
      p.codes[(s.tile->clip[f] * p.used + stage) * p.frames + s.tile->step[f]] = s.tile->counts[f] != 0 ? entry : 0;
  }

  // Takes the warp's frames from the stage before to this one's query.
  static DCX_DEVICE void advance(const Params& params, const Shared& s, int stage) {
    DCX_NO_UNROLL
    for (int f = thread_index() / kWarp; f < kFrames; f += kWarps) {
      if (stage > 0) finish(params, s, stage - 1, f);
      sync_warp();
      if (stage < params.p.used && thread_index() % kWarp == 0) aim(params, s, stage, f);
    }
  }

  static DCX_DEVICE void run(const Params& params, unsigned char* smem) {
    const RvqSearchParams& p = params.p;
    const Shared s = carve(smem);
    s.tile->fill(block_x() * kFrames, p.batch, p.frames, p.lengths);
    ProjectIn::run(p, params.slots, *s.tile, s.work, s.code);
    Ahead ahead;
    ahead.stage = 0;
    ahead.pass = thread_index() / kWarp;
    ahead.issue(params);
    sync_threads();  // s.code stands
    DCX_NO_UNROLL
    for (int stage = 0;; ++stage) {
      advance(params, s, stage);
      sync_threads();  // every query stands, or every chosen row
      if (stage == p.used) break;
      int32_t best[kSlots];
      search(params, s, ahead, best);
      sync_threads();  // every warp's largest sums stand
      choose(params, s, stage, best);
      sync_threads();  // every winner stands
    }
    write_sum<kDim, kFrames, kThreads>(p, *s.tile, s.code, s.work);
  }
};

// Two blocks share a multiprocessor where there are more of them than multiprocessors; else a block has twice the
// threads. False where the tile does not fit into shared memory.
template <int kThreads>
bool start_rvq_search_coarse_of(const CudaContext& context, const RvqSearchParams& p, int64_t tiles) {
  using K = RvqSearchCoarse<kThreads>;
  const int64_t bytes = K::smem_bytes(p);
  if (bytes > context.shared_bytes) return false;
  launch<K>(context, RvqSearchCoarseLaunch::of<K>(p), Grid{tiles, 1, 1}, bytes);
  return true;
}
inline bool start_rvq_search_coarse(const CudaContext& context, const RvqSearchParams& p) {
  const int64_t tiles = ceil_div(p.batch * p.frames, RvqSearchCoarse<256>::kFrames);
  return tiles <= context.multiprocessors ? start_rvq_search_coarse_of<512>(context, p, tiles)
                                          : start_rvq_search_coarse_of<256>(context, p, tiles);
}

}  // namespace dcx
