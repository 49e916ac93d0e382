// codes[b, i, f] = the row of codebook i nearest by angle to e_i = W_i r + a_i, for every stage in one launch, in the
// code space: e_i = (W z)_i + bias_i - sum over j < i of (W_i V_j) row_j. A block owns kFrames frames and walks all
// codebooks; a thread holds four entries' coordinates in registers and scores every frame against them, keeping each
// frame's smallest score |c|^2 - 2 e.c and the pass it came from; the entry itself is found again at the end of a
// stage. Lowest (score, index) in every reduction. float32 sums: in_proj as chains of at most 128 under a tree. kDim 8
// copies books 16 bytes at a time ahead of use; `packed` is aligned to 16 bytes.
#pragma once
#include "rvq_search_coarse.cuh"
#include "rvq_search_parts.cuh"

namespace dcx {

template <int kDim, int kFrames, bool kMargin>
struct RvqSearch {
  using Params = RvqSearchLaunch;
  using Four = Vector16<float>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr bool kNeedsSm80 = false;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kPass = kThreads;  // groups of four entries
  static constexpr int kPitch = kFramePitch<kFrames>;
  using ProjectIn = RvqProjectIn<kFrames, kThreads>;

  // The smallest score, its group of four entries, and the second smallest.
  struct Candidate {
    float score;
    int group;
    float second;
  };

  struct Shared {
    FrameTile<kFrames>* tile;
    float* code;            // [used D][kFrames]: e of the stages to come, the chosen rows of those before
    float* query;           // [kFrames][D]: -2 e / |e|
    Candidate* candidates;  // [kWarps][kFrames]
    float* work;            // z and its partial sums, then the ring of passes, then output columns
  };

  static DCX_HOST_DEVICE int64_t code_floats(const RvqSearchParams& p) {
    return round_up(p.used * p.layout.dim, 4) * kFrames;
  }
  static constexpr int64_t kCandidateBytes = kWarps * kFrames * static_cast<int64_t>(sizeof(Candidate));
  static constexpr int64_t kPassBytes = (kDim + 1) * kThreads * static_cast<int64_t>(sizeof(Four));

  static int64_t smem_bytes(const RvqSearchParams& p, int depth) {
    const int64_t fixed = static_cast<int64_t>(sizeof(FrameTile<kFrames>)) + kCandidateBytes +
                          (code_floats(p) + round_up(kFrames * p.layout.dim, 4)) * 4;
    const int64_t out = kThreads * kPitch * 4;
    return fixed + maximum(ProjectIn::smem_bytes(), maximum(out, kDim > 0 ? depth * kPassBytes : 0));
  }

  static DCX_DEVICE Shared carve(const RvqSearchParams& p, unsigned char* smem) {
    Shared s;
    s.tile = reinterpret_cast<FrameTile<kFrames>*>(smem);
    s.candidates = reinterpret_cast<Candidate*>(smem + sizeof(FrameTile<kFrames>));
    s.code = reinterpret_cast<float*>(smem + sizeof(FrameTile<kFrames>) + kCandidateBytes);
    s.query = s.code + code_floats(p);
    s.work = s.query + round_up(kFrames * p.layout.dim, 4);
    return s;
  }
  static DCX_DEVICE int dim_of(const RvqSearchParams& p) { return kDim > 0 ? kDim : static_cast<int>(p.layout.dim); }

  // The query of each frame. One whose e is not finite is broken from here on.
  static DCX_DEVICE void normalise(const RvqSearchParams& p, const Shared& s, int64_t stage) {
    const int f = thread_index(), dim = dim_of(p);
    if (f >= kFrames) return;
    if (!make_query<kDim, kFrames>(s.query + f * dim, s.code + stage * dim * kFrames + f, dim)) s.tile->broken[f] = 1;
  }

  struct Best {
    float score[kFrames];
    int group[kFrames];  // during the search: the pass
    float second[kMargin ? kFrames : 1];
  };

  static DCX_DEVICE void keep(Best& best, int f, const float (&score)[4], int pass) {
    const float low0 = fminf(score[0], score[1]), low1 = fminf(score[2], score[3]);
    const float smallest = fminf(low0, low1);
    if constexpr (kMargin) {
      const float high = fminf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]));
      const float next = fminf(fmaxf(low0, low1), high);
      best.second[f] = fminf(fminf(best.second[f], next), fmaxf(best.score[f], smallest));
    }
    const bool better = smallest < best.score[f];  // not an equal one: the lower index stays
    best.group[f] = better ? pass : best.group[f];
    best.score[f] = better ? smallest : best.score[f];
  }

  // Passes of the codebooks, in the order of their use; each thread copies what it reads itself, so no barrier is
  // needed.
  struct Ring {
    Four* slots;
    int depth, taken, passes;
    int64_t stage, pass;  // the next to be copied

    DCX_DEVICE Four* slot(int number) const {
      return slots + (number & (depth - 1)) * ((kDim + 1) * kThreads) + thread_index();
    }
    DCX_DEVICE void issue(const RvqSearchParams& p, int number) {
      if (stage < p.used) {
        const int64_t four = pass * kPass + thread_index(), group = four / 4;
        if (group < p.layout.groups()) {
          const float* from = packed_of(p) + p.layout.books() + stage * p.layout.book_size() +
                              group * ((kDim + 1) * kCodeGroup) + four % 4 * 4;
          Four* to = slot(number);
          DCX_UNROLL
          for (int d = 0; d <= kDim; ++d) cp_async16(to + d * kThreads, from + d * kCodeGroup, true);
        }
        if (++pass == passes) {
          pass = 0;
          ++stage;
        }
      }
      cp_async_commit();
    }
    DCX_DEVICE void wait() const {
      if (depth == 4)
        cp_async_wait<3>();
      else if (depth == 2)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
    }
  };

  static DCX_DEVICE void search_ahead(const RvqSearchParams& p, const Shared& s, Ring& ring, Best& best) {
    DCX_NO_UNROLL
    for (int pass = 0; pass < ring.passes; ++pass) {
      ring.wait();
      Four book[kDim + 1];
      const Four* from = ring.slot(ring.taken);
      DCX_UNROLL
      for (int d = 0; d <= kDim; ++d) book[d] = from[d * kThreads];
      ring.issue(p, ring.taken + ring.depth);
      ++ring.taken;
      if ((pass * kPass + thread_index()) / 4 >= p.layout.groups()) continue;
      DCX_UNROLL
      for (int f = 0; f < kFrames; ++f) {
        float query[kDim > 0 ? kDim : 1], score[4];
        load_frames(query, s.query + f * kDim);
        DCX_UNROLL
        for (int k = 0; k < 4; ++k) score[k] = book[0].values[k];
        DCX_UNROLL
        for (int d = 0; d < kDim; ++d) DCX_UNROLL
        for (int k = 0; k < 4; ++k) score[k] = fused_multiply_add(query[d], book[d + 1].values[k], score[k]);
        keep(best, f, score, pass);
      }
    }
  }

  static DCX_DEVICE void search_any(const RvqSearchParams& p, const Shared& s, int64_t stage, Best& best) {
    const int dim = dim_of(p);
    const float* books = packed_of(p) + p.layout.books() + stage * p.layout.book_size();
    const int passes = static_cast<int>(ceil_div(p.layout.groups() * 4, kPass));
    DCX_NO_UNROLL
    for (int pass = 0; pass < passes; ++pass) {
      const int four = pass * kPass + thread_index();
      if (four / 4 >= p.layout.groups()) continue;
      const float* book = books + int64_t{four / 4} * (dim + 1) * kCodeGroup + four % 4 * 4;
      float score[kFrames][4];
      DCX_UNROLL
      for (int f = 0; f < kFrames; ++f) DCX_UNROLL
      for (int k = 0; k < 4; ++k) score[f][k] = book[k];
      for (int d = 0; d < dim; ++d) {
        book += kCodeGroup;
        DCX_UNROLL
        for (int f = 0; f < kFrames; ++f) DCX_UNROLL
        for (int k = 0; k < 4; ++k) score[f][k] = fused_multiply_add(s.query[f * dim + d], book[k], score[f][k]);
      }
      DCX_UNROLL
      for (int f = 0; f < kFrames; ++f) keep(best, f, score[f], pass);
    }
  }

  static DCX_DEVICE Candidate better_of(const Candidate& a, const Candidate& b) {
    const bool second_wins = b.score < a.score || (b.score == a.score && b.group < a.group);
    Candidate winner = second_wins ? b : a;
    if constexpr (kMargin) winner.second = fminf(fminf(a.second, b.second), second_wins ? a.score : b.score);
    return winner;
  }

  // Over the lanes of a warp: each step hands half of the frames to the lane kMask away and takes the other half's
  // candidates from it; lane l ends with frame l * kFrames / 32.
  template <int kCount, int kMask>
  static DCX_DEVICE void fold(Best& best) {
    const bool upper = (thread_index() & kMask) != 0;
    constexpr int kHalf = kCount / 2 > 0 ? kCount / 2 : 1;
    DCX_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const int low = i, high = kCount == 1 ? i : i + kHalf;
      const auto at = [&](int f) { return Candidate{best.score[f], best.group[f], kMargin ? best.second[f] : 0.0f}; };
      const Candidate kept = upper ? at(high) : at(low), given = upper ? at(low) : at(high);
      Candidate other;
      other.score = shuffle_xor(given.score, kMask);
      other.group = shuffle_xor(given.group, kMask);
      other.second = kMargin ? shuffle_xor(given.second, kMask) : 0.0f;
      const Candidate winner = better_of(kept, other);
      best.score[i] = winner.score;
      best.group[i] = winner.group;
      if constexpr (kMargin) best.second[i] = winner.second;
    }
    if constexpr (kMask > 1) fold<kHalf, kMask / 2>(best);
  }

  static DCX_DEVICE void search(const RvqSearchParams& p, const Shared& s, int64_t stage, Ring& ring) {
    Best best;
    DCX_UNROLL
    for (int f = 0; f < kFrames; ++f) {
      best.score[f] = infinity();
      best.group[f] = 0;
      if constexpr (kMargin) best.second[f] = infinity();
    }
    if constexpr (kDim > 0)
      search_ahead(p, s, ring, best);
    else
      search_any(p, s, stage, best);
    DCX_UNROLL
    for (int f = 0; f < kFrames; ++f) best.group[f] = best.group[f] * kPass + thread_index();
    fold<kFrames, kWarp / 2>(best);
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    if (lane % (kWarp / kFrames) == 0)
      s.candidates[warp * kFrames + lane * kFrames / kWarp] =
          Candidate{best.score[0], best.group[0], kMargin ? best.second[0] : 0.0f};
  }

  // Four lanes per frame score the winning group's entries once more, in the same order of operations: the lowest entry
  // with the smallest score is the code. Its row goes into the stage's place in s.code.
  static DCX_DEVICE void choose(const RvqSearchParams& p, const Shared& s, int64_t stage) {
    if (thread_index() >= round_up(4 * kFrames, kWarp)) return;
    const RvqLayout& layout = p.layout;
    const int dim = dim_of(p), f = minimum(thread_index() / 4, kFrames - 1), k = thread_index() % 4;
    Candidate best = s.candidates[f];
    for (int warp = 1; warp < kWarps; ++warp) best = better_of(best, s.candidates[warp * kFrames + f]);
    const bool broken = s.tile->broken[f] != 0;
    const int64_t entry = broken ? k : int64_t{best.group} * 4 + k;
    const bool real = entry < layout.entries;
    const float* row = packed_of(p) + layout.rows() + (stage * layout.entries + (real ? entry : 0)) * dim;
    const float* book = packed_of(p) + layout.books() + stage * layout.book_size() +
                        (real ? entry / kCodeGroup * (dim + 1) * kCodeGroup + entry % kCodeGroup : 0);
    float kept[kDim > 0 ? kDim : 1];
    if constexpr (kDim > 0) load_frames(kept, row);
    float score = book[0];
    for (int d = 0; d < dim; ++d) score = fused_multiply_add(s.query[f * dim + d], book[(d + 1) * kCodeGroup], score);
    const bool wins = real && (broken ? k == 0 : score == best.score);
    const uint32_t votes = ballot(wins) >> (thread_index() % kWarp / 4 * 4) & 15u;
    const int first = (votes & 1u) ? 0 : (votes & 2u) ? 1 : (votes & 4u) ? 2 : (votes & 8u) ? 3 : 0;
    if (k != first || thread_index() >= 4 * kFrames) return;
    for (int d = 0; d < dim; ++d) s.code[(stage * dim + d) * kFrames + f] = kDim > 0 ? kept[kDim > 0 ? d : 0] : row[d];
    if (!s.tile->exists[f]) return;
    const bool counts = s.tile->counts[f] != 0;
    const int64_t position = (s.tile->clip[f] * p.used + stage) * p.frames + s.tile->step[f];
    p.codes[position] = counts ? entry : 0;
    if (!kMargin || p.margin == nullptr) return;
    static_cast<float*>(p.margin)[position] = !counts ? 0.0f : broken ? not_a_number() : best.second - best.score;
  }

  // Takes the chosen rows off the later stages' e.
  static DCX_DEVICE void take_off(const RvqSearchParams& p, const Shared& s, int64_t stage) {
    const int dim = dim_of(p);
    const float* chosen = s.code + stage * dim * kFrames;
    const int items = static_cast<int>((p.used - stage - 1) * dim) * kFrames;
    for (int i = thread_index(); i < items; i += kThreads) {
      const int f = i % kFrames, column = i / kFrames;
      const int64_t later = stage + 1 + column / dim;
      const float* cross =
          packed_of(p) + p.layout.cross() + ((later * p.layout.stages + stage) * dim + column % dim) * dim;
      float off = 0.0f;
      for (int k = 0; k < dim; ++k) off = fused_multiply_add(cross[k], chosen[k * kFrames + f], off);
      float* e = s.code + ((stage + 1) * dim + column) * kFrames + f;
      *e = *e - off;
    }
  }

  static DCX_DEVICE void run(const Params& params, unsigned char* smem) {
    const RvqSearchParams& p = params.p;
    const Shared s = carve(p, smem);
    s.tile->fill(block_x() * kFrames, p.batch, p.frames, p.lengths);
    ProjectIn::run(p, params.slots, *s.tile, s.work, s.code);
    sync_threads();  // s.work is free, s.code stands
    Ring ring{reinterpret_cast<Four*>(s.work), params.depth, 0, 0, 0, 0};
    if constexpr (kDim > 0) {
      ring.passes = static_cast<int>(ceil_div(p.layout.groups() * 4, kPass));
      for (int i = 0; i < ring.depth; ++i) ring.issue(p, i);
    }
    DCX_NO_UNROLL
    for (int64_t stage = 0; stage < p.used; ++stage) {
      normalise(p, s, stage);
      sync_threads();
      search(p, s, stage, ring);
      sync_threads();
      choose(p, s, stage);
      sync_threads();
      take_off(p, s, stage);
      sync_threads();
    }
    write_sum<kDim, kFrames, kThreads>(p, *s.tile, s.code, s.work);
  }
};

// Launches where the tile fits into shared memory; false where it does not.
template <class K>
bool start_rvq_search_as(const CudaContext& context, const RvqSearchParams& p, int64_t tiles) {
  RvqSearchLaunch launched{p, slots_of<K>(p), 4};
  // Two blocks share a multiprocessor where there are more of them than multiprocessors; 1 KB is the system's.
  const int64_t room = tiles > context.multiprocessors ? context.shared_bytes / 2 - 1024 : context.shared_bytes;
  while (launched.depth > 1 && K::smem_bytes(p, launched.depth) > room) launched.depth /= 2;
  const int64_t bytes = K::smem_bytes(p, launched.depth);
  if (bytes > context.shared_bytes) return false;
  launch<K>(context, launched, Grid{tiles, 1, 1}, bytes);
  return true;
}
template <int kDim, int kFrames>
bool start_rvq_search(const CudaContext& context, const RvqSearchParams& p) {
  const int64_t tiles = ceil_div(p.batch * p.frames, kFrames);
  if constexpr (kDim > 0)
    if (p.margin == nullptr) return start_rvq_search_as<RvqSearch<kDim, kFrames, false>>(context, p, tiles);
  return start_rvq_search_as<RvqSearch<kDim, kFrames, true>>(context, p, tiles);
}

// The tile decides who computes a frame, never what comes out. Few frames take small tiles, so that more
// multiprocessors read the codebooks at once: README.md has the numbers. Margins need every row's score.
inline void start_rvq_search_of(const CudaContext& context, const RvqSearchParams& p) {
  const int64_t frames = p.batch * p.frames;
  const bool few = 4 * frames <= context.multiprocessors, some = frames <= 2 * context.multiprocessors;
  bool started = false;
  if (p.layout.dim == 8) {
    const bool coarse = !few && !some && p.margin == nullptr && context.capability >= 80;
    started = (coarse && start_rvq_search_coarse(context, p)) ||
              (!few && !some && start_rvq_search<8, 16>(context, p)) || (!few && start_rvq_search<8, 4>(context, p)) ||
              start_rvq_search<8, 1>(context, p);
  } else {
    started = (!few && start_rvq_search<0, 4>(context, p)) || start_rvq_search<0, 1>(context, p);
  }
  if (!started)
    throw std::runtime_error("rvq_search: so many code dimensions need more shared memory than this GPU has");
}

}  // namespace dcx
