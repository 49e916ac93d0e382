// The device side's vocabulary: storage types, warp and block primitives, asynchronous copies, tensor-core products.
// nvcc compiles it to PTX. A host compiler gets the same names from tests/simt/simt.h, which runs a block's threads as
// fibers, so that every .cuh runs on a CPU under sanitizers. Kernels therefore use these wrappers alone, take all
// shared memory from the pointer that run() is given, and keep every wrapper that names a warp convergent.
#pragma once
#include <stdint.h>

#include "dtype.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DCX_DEVICE __device__ __forceinline__
#define DCX_DEVICE_COLD inline __device__ __noinline__
#define DCX_UNROLL _Pragma("unroll")
#define DCX_UNROLL_BY_4 _Pragma("unroll 4")
#define DCX_NO_UNROLL _Pragma("unroll 1")
#else
#define DCX_DEVICE inline
#define DCX_DEVICE_COLD inline
#define DCX_UNROLL
#define DCX_UNROLL_BY_4
#define DCX_NO_UNROLL
#endif

namespace dcx {

// 16-bit floats as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::kF16;
};

// 16 bytes of T, moved at once.
template <class T>
struct alignas(16) Vector16 {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T values[kCount];
};

// The capability, times ten, that code is made for, 0 on the host: ptxas spills for one where it does not for another.
#ifdef __CUDA_ARCH__
constexpr int kCompiledFor = __CUDA_ARCH__ / 10;
#else
constexpr int kCompiledFor = 0;
#endif

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

DCX_DEVICE float to_float(float x) { return x; }
DCX_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DCX_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
DCX_DEVICE T from_float(float x);
template <>
DCX_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DCX_DEVICE bf16 from_float<bf16>(float x) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
DCX_DEVICE f16 from_float<f16>(float x) {
  return f16{__half_as_ushort(__float2half_rn(x))};
}

DCX_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DCX_DEVICE int64_t block_x() { return static_cast<int64_t>(blockIdx.x); }
DCX_DEVICE int64_t block_y() { return static_cast<int64_t>(blockIdx.y); }
DCX_DEVICE int64_t block_z() { return static_cast<int64_t>(blockIdx.z); }

DCX_DEVICE void sync_threads() { __syncthreads(); }
// A barrier of `threads` threads, whole warps, of which the part-th so many meet; 15 parts at most.
DCX_DEVICE void sync_part(int part, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(part + 1), "r"(threads) : "memory");
}
DCX_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
DCX_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
DCX_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
DCX_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kAllLanes, value); }

DCX_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to shared memory behind the thread's back; zeros when `valid` is false. Both addresses are 16-byte
// aligned. The thread sees the bytes after cp_async_wait, other threads after a barrier behind that.
DCX_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
// As that, 4 bytes: for what does not lie side by side in both places.
DCX_DEVICE void cp_async4(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *static_cast<uint32_t*>(shared) = valid ? *static_cast<const uint32_t*>(global) : 0;
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
#endif
}
DCX_DEVICE void cp_async_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kPending` of the thread's latest groups are still under way.
template <int kPending>
DCX_DEVICE void cp_async_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, 16-byte aligned. Lane l
// gets of matrix i the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1); transposed: those of the transpose.
DCX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
DCX_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8], float32 sums. With g = lane / 4 and t = 2 (lane % 4): a holds rows g, g + 8 at
// columns t, t + 1, then the same rows at t + 8, t + 9; b rows t, t + 1, then t + 8, t + 9, at column g; d row g, then
// g + 8, at columns t, t + 1.
template <class T>
DCX_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DCX_DEVICE void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // the launcher refuses bf16 there
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
template <>
DCX_DEVICE void mma_16x8x16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d[16 x 8] += a[16 x 8] b[8 x 8] on operands rounded to tf32. With g = lane / 4 and t = lane % 4: a holds (g, t),
// (g + 8, t), (g, t + 4), (g + 8, t + 4); b holds (t, g), (t + 4, g); d as above.
DCX_DEVICE void mma_16x8x8_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // the launcher takes the float32 kernel there
#else
  uint32_t r[6];
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[0]) : "f"(a[0]));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[1]) : "f"(a[1]));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[2]) : "f"(a[2]));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[3]) : "f"(a[3]));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[4]) : "f"(b0));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[5]) : "f"(b1));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(r[4]), "r"(r[5]));
#endif
}

// d[16 x 8] = a[16 x 16] b[16 x 8], a's bytes signed and b's unsigned, exact. With g = lane / 4 and t = 4 (lane % 4): a
// holds row g, then g + 8, at columns t to t + 3; b rows t to t + 3 at column g; d as above.
DCX_DEVICE void mma_16x8x16_bytes(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // the launcher takes another kernel there
#else
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "r"(0));
#endif
}

// A kernel may be started before the one in front of it in the stream has ended (launch.cuh). grid_wait waits for that
// end, and for its stores; until then a kernel may read nothing but what was there long before, and write nothing.
DCX_DEVICE void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernel behind start once every block has come here.
DCX_DEVICE void grid_release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Blocks of a cluster (launch.cuh) wait for each other, and see what each has stored in its shared memory before.
DCX_DEVICE void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
#endif
}
// Its halves, for who has nothing to show: this block has what it loaded from others; all others have what they did.
DCX_DEVICE void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
DCX_DEVICE void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}
// What another block of the cluster, by its number, has where this one has `own`: 16 bytes of shared memory.
DCX_DEVICE Vector16<float> load_from_block(const float* own, int block) {
  Vector16<float> v{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem_address(own)), "r"(block));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.values[0]), "=f"(v.values[1]), "=f"(v.values[2]), "=f"(v.values[3])
               : "r"(there)
               : "memory");
#endif
  return v;
}

DCX_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) { return atomicAdd(p, value); }
// Adds one, past `last` from zero again; returns what was there.
DCX_DEVICE uint32_t atomic_count(uint32_t* p, uint32_t last) { return atomicInc(p, last); }
DCX_DEVICE void atomic_min(int64_t* p, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(p), static_cast<long long>(value));
}
DCX_DEVICE void thread_fence() { __threadfence(); }
// A store to memory of the host, which sees it behind the kernel's end; many threads may store the same value.
DCX_DEVICE void tell_host(int64_t* p, int64_t value) { *static_cast<volatile int64_t*>(p) = value; }
// A load that other blocks' fenced stores are visible to.
DCX_DEVICE float load_coherent(const float* p) { return __ldcg(p); }
// Brings a line to L2, where every later load sees what is stored meanwhile.
DCX_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// Has p in a register from here on.
template <class T>
DCX_DEVICE void hold(T*& p) {
  asm volatile("" : "+l"(p));
}
DCX_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DCX_DEVICE float approximate_sine(float x) { return __sinf(x); }
DCX_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DCX_DEVICE uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
DCX_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
// The number of the lowest bit that is set; there is one.
DCX_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
DCX_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Two neighbours in one word, the first in the low half.
template <class T>
DCX_DEVICE uint32_t pack_pair(float low, float high);
template <>
DCX_DEVICE uint32_t pack_pair<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
DCX_DEVICE uint32_t pack_pair<f16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
DCX_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
DCX_DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

#else
}  // namespace dcx
#include "simt.h"
namespace dcx {
#endif

// Value i of 16 bytes of T that were loaded as words: values of 16 bits would take a register each, and unpacking them
// would wait for the load.
template <class T>
DCX_DEVICE float value_of(const Vector16<uint32_t>& words, int i) {
  if constexpr (sizeof(T) == 4) {
    return float_of(words.values[i]);
  } else {
    const uint32_t word = words.values[i / 2];
    if (DTypeOf<T>::value == DType::kBF16) return float_of(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
  }
}

}  // namespace dcx
