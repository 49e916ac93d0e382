// Runs CUDA kernels on the CPU: the names of kernels/common/device.cuh for a host compiler. Each thread of a block is a
// fiber. A fiber runs until it reaches a barrier or a warp operation, then another one is picked at random by seed, so
// that code which needs a barrier it does not have reads stale or poisoned memory under some seed. Shared memory starts
// as NaN and has exactly the bytes asked for, in memory of its own, so that AddressSanitizer sees an overrun. An
// asynchronous copy lands at once or only when waited for, by the same seed.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <string>
#include <typeinfo>

namespace simt {

// The order of threads and blocks, and of asynchronous copies.
void set_seed(uint64_t seed);
// The demangled names of the kernels that ran, one a line.
std::string kernels_that_ran();

// Inside a kernel ----------------------------------------------------------------------------------------------------

struct Position {
  int thread;
  int64_t block[3];
};
const Position& position();

// What a warp does together: the last lane to arrive runs `all` over every lane's argument. `name` must be the same in
// each lane.
void warp_together(const char* name, void* argument, void (*all)(void* const (&arguments)[32]));
void barrier();
void barrier_of(int first, int count);  // of these threads alone
void arrive_in_cluster();
void wait_for_cluster();  // until all threads have arrived as often as this one
// What a block of the cluster has in its shared memory where this one has `own`.
const void* in_block(const void* own, size_t bytes, int block);
void copy_later(void* to, const void* from, size_t bytes);  // zeros where from is null
void commit_copies();
void wait_copies(int pending);
// A thread's share of a warpgroup's product of two panels (wgmma.cuh), done at some time up to the wait.
void multiply_later(float* d, const unsigned char* a, const unsigned char* b, int panel_bytes, int columns,
                    float (*value)(uint16_t));
void commit_products();
void wait_products(int pending);
[[noreturn]] void fail(const std::string& what);

// Around it ----------------------------------------------------------------------------------------------------------

// cluster: so many blocks that follow each other in z run side by side.
void run_blocks(const std::type_info& kernel, int threads, int64_t x, int64_t y, int64_t z, size_t smem_bytes,
                int64_t cluster, void (*run)(void* context, unsigned char* smem), void* context);

template <class K>
void run_grid(const typename K::Params& p, int64_t x, int64_t y, int64_t z, int64_t smem_bytes, int64_t cluster) {
  run_blocks(
      typeid(K), K::kThreads, x, y, z, static_cast<size_t>(smem_bytes), cluster,
      [](void* context, unsigned char* smem) { K::run(*static_cast<const typename K::Params*>(context), smem); },
      const_cast<void*>(static_cast<const void*>(&p)));
}

template <class T>
struct Exchange {
  T value;
  int from;  // the lane whose value is wanted
  T result;
};

template <class T>
T exchange(const char* name, T value, int from) {
  Exchange<T> mine{value, from, value};
  warp_together(name, &mine, [](void* const(&all)[32]) {
    for (void* lane : all) {
      auto* own = static_cast<Exchange<T>*>(lane);
      own->result = static_cast<const Exchange<T>*>(all[own->from & 31])->value;
    }
  });
  return mine.result;
}

struct LoadMatrix {
  const void* row;
  bool transposed;
  uint32_t* result;
};
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

// A product of fragments that lie as the hardware has them: K = 16 with two 16-bit values in a word, or K = 8 of
// floats.
struct Product {
  float* d;        // 4
  const float* a;  // [rows g, g + 8][its columns], unpacked: see the callers
  const float* b;
  int per_lane;  // columns of a that a lane holds in one row
};
void multiply_fragments(Product& mine, bool pairs);

}  // namespace simt

namespace dcx {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(f16 x) {
  _Float16 value;
  memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return bf16{0x7fff};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  f16 out;
  memcpy(&out.bits, &value, 2);
  return out;
}

inline int thread_index() { return simt::position().thread; }
inline int64_t block_x() { return simt::position().block[0]; }
inline int64_t block_y() { return simt::position().block[1]; }
inline int64_t block_z() { return simt::position().block[2]; }

inline void sync_threads() { simt::barrier(); }
inline void sync_part(int part, int threads) { simt::barrier_of(part * threads, threads); }
inline void cluster_arrive() { simt::arrive_in_cluster(); }
inline void cluster_wait() { simt::wait_for_cluster(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
Vector16<float> load_from_block(const float* own, int block);
inline void sync_warp() {
  simt::warp_together("sync_warp", nullptr, [](void* const(&)[32]) {});
}
template <class T>
inline T shuffle(T value, int lane) {
  return simt::exchange("shuffle", value, lane);
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  return simt::exchange("shuffle_xor", value, thread_index() % 32 ^ mask);
}
uint32_t ballot(bool value);

void cp_async16(void* shared, const void* global, bool valid);
void cp_async4(void* shared, const void* global, bool valid);
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
inline void cp_async_wait() {
  simt::wait_copies(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, true); }

template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto low = [](uint32_t word) { return to_float(T{static_cast<uint16_t>(word)}); };
  const auto high = [](uint32_t word) { return to_float(T{static_cast<uint16_t>(word >> 16)}); };
  const float rows[8] = {low(a[0]), high(a[0]), low(a[2]), high(a[2]), low(a[1]), high(a[1]), low(a[3]), high(a[3])};
  const float columns[4] = {low(b0), high(b0), low(b1), high(b1)};
  simt::Product mine{d, rows, columns, 4};
  simt::multiply_fragments(mine, true);
}
void mma_16x8x8_tf32(float (&d)[4], const float (&a)[4], float b0, float b1);
void mma_16x8x16_bytes(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b);

struct Panel {
  const unsigned char* start;
  int panel_bytes;
};
inline Panel panel_at(const void* p, int panel_bytes) {
  if (reinterpret_cast<uintptr_t>(p) % 1024 != 0) simt::fail("a panel starts at a multiple of 1024 bytes");
  return Panel{static_cast<const unsigned char*>(p), panel_bytes};
}
inline Panel moved(Panel panel, int bytes) { return Panel{panel.start + bytes, panel.panel_bytes}; }
inline void fence_async() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { simt::commit_products(); }
template <int kPending>
inline void wgmma_wait() {
  simt::wait_products(kPending);
}
template <int kCount>
inline void settle(float (&)[kCount]) {}
template <class T, int kColumns>
inline void wgmma(float (&d)[kColumns / 2], Panel a, Panel b) {
  simt::multiply_later(d, a.start, b.start, b.panel_bytes, kColumns, [](uint16_t bits) { return to_float(T{bits}); });
}

inline void grid_wait() {}
inline void grid_release() {}
uint32_t atomic_add(uint32_t* p, uint32_t value);
uint32_t atomic_count(uint32_t* p, uint32_t last);
void atomic_min(int64_t* p, int64_t value);
inline void thread_fence() {}
inline void tell_host(int64_t* p, int64_t value) { *p = value; }
inline float load_coherent(const float* p) { return *p; }
inline void prefetch_l2(const void*) {}
template <class T>
inline void hold(T*&) {}
inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline float approximate_sine(float x) { return sinf(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int lowest_bit(uint32_t bits) {
  if (bits == 0) simt::fail("lowest_bit: none is set");
  return __builtin_ctz(bits);
}
template <class T>
inline uint32_t pack_pair(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float infinity() { return INFINITY; }
inline float not_a_number() { return NAN; }

}  // namespace dcx
