// Products of a whole warpgroup (four warps, the first one's index a multiple of four) on tensor cores, as Hopper has
// them: both operands come from shared memory, behind the threads' back. Operands lie as panels of rows of 128 bytes,
// 64 16-bit values, in which cell c of 16 bytes of row r stands at c ^ (r % 8); a panel starts at a multiple of 1024
// bytes. Compiled for sm_90a alone. Threads that wrote an operand call fence_async before the barrier in front of the
// product, and the accumulators may not be touched between wgmma_fence and the wgmma_wait that covers their product.
#pragma once
#include "device.cuh"

namespace dcx {

constexpr int kPanelColumns = 64;  // 16-bit values in a row of a panel
constexpr int kPanelRowBytes = 128;

// Where cell `cell` of row `row` stands, in cells from the panel's start.
DCX_DEVICE int panel_cell(int row, int cell) { return row * 8 + (cell ^ (row & 7)); }

#ifdef __CUDACC__

// An operand: a panel's start moved by whole rows (a tap) or by 32 bytes (16 values); further panels lie
// `panel_bytes` behind each other.
struct Panel {
  uint64_t bits;
};
DCX_DEVICE Panel panel_at(const void* p, int panel_bytes) {
  return Panel{static_cast<uint64_t>((smem_address(p) & 0x3ffff) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
               static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62};
}
DCX_DEVICE Panel moved(Panel panel, int bytes) {  // within shared memory: the address's half does not overflow
  const uint32_t low = static_cast<uint32_t>(panel.bits) + static_cast<uint32_t>(bytes >> 4);
  return Panel{(panel.bits & 0xffffffff00000000ull) | low};
}

DCX_DEVICE void fence_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
DCX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DCX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the latest groups are still under way.
template <int kPending>
DCX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Makes the compiler read the accumulators behind the wait in front of it, not before.
template <int kCount>
DCX_DEVICE void settle(float (&d)[kCount]) {
  DCX_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
#else
DCX_DEVICE void wgmma_fence() {}
DCX_DEVICE void wgmma_commit() {}
template <int kPending>
DCX_DEVICE void wgmma_wait() {}
template <int kCount>
DCX_DEVICE void settle(float (&)[kCount]) {}
#endif

// d[64 x kColumns] += a[64 x 16] b[16 x kColumns]: a's rows are a panel's rows, b's rows too, so that b is as it lies
// in memory, columns side by side. With g = lane / 4 and t = 2 (lane % 4), a thread of warp w of the group holds of row
// 16 w + g, then of row 16 w + g + 8, the columns 8 n + t and 8 n + t + 1 as d[4 n], d[4 n + 1], d[4 n + 2], d[4 n +
// 3].
template <class T, int kColumns>
DCX_DEVICE void wgmma(float (&d)[kColumns / 2], Panel a, Panel b);

#define DCX_D8(i)                                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

#define DCX_N0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DCX_N8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define DCX_N16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define DCX_N24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define DCX_N32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define DCX_N40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define DCX_N48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define DCX_N56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define DCX_N64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define DCX_N72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define DCX_N80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define DCX_N88 "%88, %89, %90, %91, %92, %93, %94, %95"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DCX_WGMMA(type, name, columns, sums, a_at, b_at, one_at, ...)                                      \
  template <>                                                                                              \
  DCX_DEVICE void wgmma<type, columns>(float (&d)[columns / 2], Panel a, Panel b) {                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " one_at ", 0; wgmma.mma_async.sync.aligned.m64n" #columns \
                 "k16.f32." name "." name " {" sums "}, " a_at ", " b_at ", p, 1, 1, 0, 1;}"               \
                 : __VA_ARGS__                                                                             \
                 : "l"(a.bits), "l"(b.bits), "r"(1));                                                      \
  }
#else
#define DCX_WGMMA(type, name, columns, sums, a_at, b_at, one_at, ...)          \
  template <>                                                                  \
  DCX_DEVICE void wgmma<type, columns>(float (&)[columns / 2], Panel, Panel) { \
    __trap();                                                                  \
  }
#endif
#define DCX_WGMMA_BOTH(columns, sums, a_at, b_at, one_at, ...)            \
  DCX_WGMMA(bf16, "bf16", columns, sums, a_at, b_at, one_at, __VA_ARGS__) \
  DCX_WGMMA(f16, "f16", columns, sums, a_at, b_at, one_at, __VA_ARGS__)
#define DCX_OUTS32 DCX_D8(0), DCX_D8(8)
#define DCX_OUTS48 DCX_D8(0), DCX_D8(8), DCX_D8(16)
#define DCX_OUTS64 DCX_D8(0), DCX_D8(8), DCX_D8(16), DCX_D8(24)
#define DCX_OUTS96 DCX_D8(0), DCX_D8(8), DCX_D8(16), DCX_D8(24), DCX_D8(32), DCX_D8(40)
#define DCX_OUTS128 DCX_D8(0), DCX_D8(8), DCX_D8(16), DCX_D8(24), DCX_D8(32), DCX_D8(40), DCX_D8(48), DCX_D8(56)
#define DCX_OUTS192                                                                                         \
  DCX_D8(0), DCX_D8(8), DCX_D8(16), DCX_D8(24), DCX_D8(32), DCX_D8(40), DCX_D8(48), DCX_D8(56), DCX_D8(64), \
      DCX_D8(72), DCX_D8(80), DCX_D8(88)
DCX_WGMMA_BOTH(32, DCX_N0 ", " DCX_N8, "%16", "%17", "%18", DCX_OUTS32)
DCX_WGMMA_BOTH(48, DCX_N0 ", " DCX_N8 ", " DCX_N16, "%24", "%25", "%26", DCX_OUTS48)
DCX_WGMMA_BOTH(64, DCX_N0 ", " DCX_N8 ", " DCX_N16 ", " DCX_N24, "%32", "%33", "%34", DCX_OUTS64)
DCX_WGMMA_BOTH(96, DCX_N0 ", " DCX_N8 ", " DCX_N16 ", " DCX_N24 ", " DCX_N32 ", " DCX_N40, "%48", "%49", "%50",
               DCX_OUTS96)
DCX_WGMMA_BOTH(128, DCX_N0 ", " DCX_N8 ", " DCX_N16 ", " DCX_N24 ", " DCX_N32 ", " DCX_N40 ", " DCX_N48 ", " DCX_N56,
               "%64", "%65", "%66", DCX_OUTS128)
DCX_WGMMA_BOTH(192,
               DCX_N0 ", " DCX_N8 ", " DCX_N16 ", " DCX_N24 ", " DCX_N32 ", " DCX_N40 ", " DCX_N48 ", " DCX_N56
                      ", " DCX_N64 ", " DCX_N72 ", " DCX_N80 ", " DCX_N88,
               "%96", "%97", "%98", DCX_OUTS192)

#undef DCX_WGMMA_BOTH
#undef DCX_WGMMA

#endif  // __CUDACC__

}  // namespace dcx
