// Two more forms of wgmma.cuh's product: one that starts its sums, so that nothing needs to clear them, and one with a
// from registers, so that values which a thread has just computed from a product's sums are the next one's operand
// without a way through shared memory.
#pragma once
#include "wgmma.cuh"

namespace dcx {

// The row whose cell thread % 4 is a thread's, where rows have four cells: those of eight neighbouring threads, which
// shared memory serves at once, lie in different places of a panel's rows, since rows 4 apart have theirs in the halves
// of a row.
DCX_DEVICE int row_of_four_cells(int thread) { return thread / 32 * 8 + thread / 8 % 4 + thread % 8 / 4 * 4; }

// wgmma.cuh's product; kAdds: += as there, else =.
template <class T, int kColumns, bool kAdds>
DCX_DEVICE void wgmma_rows(float (&d)[kColumns / 2], Panel a, Panel b);

// d[64 x kColumns] = or += a[64 x 16] b[16 x kColumns]. With g = lane / 4 and t = 2 (lane % 4), a thread of warp w of
// the group holds row 16 w + g, columns t, t + 1 in a[0] and t + 8, t + 9 in a[2], of row 16 w + g + 8 those in a[1]
// and a[3]: the layout of sums 8 k to 8 k + 7 of a product. a may not change before the wgmma_wait that covers the
// product.
template <class T, int kColumns, bool kAdds>
DCX_DEVICE void wgmma_hidden(float (&d)[kColumns / 2], const uint32_t (&a)[4], Panel b);

#ifdef __CUDACC__

// at0, at1 and so on number the operands behind the sums.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DCX_WGMMA(type, name, columns, adds, sums, at0, at1, at2, at3, at4, at5, ...)                                \
  template <>                                                                                                        \
  DCX_DEVICE void wgmma_rows<type, columns, adds>(float (&d)[columns / 2], Panel a, Panel b) {                       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " at2 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns              \
                 "k16.f32." name "." name " {" sums "}, " at0 ", " at1 ", p, 1, 1, 0, 1;}"                           \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a.bits), "l"(b.bits), "n"(adds));                                                             \
  }                                                                                                                  \
  template <>                                                                                                        \
  DCX_DEVICE void wgmma_hidden<type, columns, adds>(float (&d)[columns / 2], const uint32_t (&a)[4], Panel b) {      \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " at5 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns              \
                 "k16.f32." name "." name " {" sums "}, {" at0 ", " at1 ", " at2 ", " at3 "}, " at4 ", p, 1, 1, 1;}" \
                 : __VA_ARGS__                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "n"(adds));                              \
  }
#else
#define DCX_WGMMA(type, name, columns, adds, sums, at0, at1, at2, at3, at4, at5, ...)                       \
  template <>                                                                                               \
  DCX_DEVICE void wgmma_rows<type, columns, adds>(float (&)[columns / 2], Panel, Panel) {                   \
    __trap();                                                                                               \
  }                                                                                                         \
  template <>                                                                                               \
  DCX_DEVICE void wgmma_hidden<type, columns, adds>(float (&)[columns / 2], const uint32_t (&)[4], Panel) { \
    __trap();                                                                                               \
  }
#endif
#define DCX_WGMMA_ALL(columns, sums, at0, at1, at2, at3, at4, at5, ...)                    \
  DCX_WGMMA(bf16, "bf16", columns, false, sums, at0, at1, at2, at3, at4, at5, __VA_ARGS__) \
  DCX_WGMMA(bf16, "bf16", columns, true, sums, at0, at1, at2, at3, at4, at5, __VA_ARGS__)  \
  DCX_WGMMA(f16, "f16", columns, false, sums, at0, at1, at2, at3, at4, at5, __VA_ARGS__)   \
  DCX_WGMMA(f16, "f16", columns, true, sums, at0, at1, at2, at3, at4, at5, __VA_ARGS__)
#define DCX_SUMS48 DCX_N0 ", " DCX_N8 ", " DCX_N16
#define DCX_SUMS96 DCX_SUMS48 ", " DCX_N24 ", " DCX_N32 ", " DCX_N40
#define DCX_SUMS128 DCX_SUMS96 ", " DCX_N48 ", " DCX_N56
DCX_WGMMA_ALL(32, DCX_N0 ", " DCX_N8, "%16", "%17", "%18", "%19", "%20", "%21", DCX_OUTS32)
DCX_WGMMA_ALL(48, DCX_SUMS48, "%24", "%25", "%26", "%27", "%28", "%29", DCX_OUTS48)
DCX_WGMMA_ALL(64, DCX_SUMS48 ", " DCX_N24, "%32", "%33", "%34", "%35", "%36", "%37", DCX_OUTS64)
DCX_WGMMA_ALL(96, DCX_SUMS96, "%48", "%49", "%50", "%51", "%52", "%53", DCX_OUTS96)
DCX_WGMMA_ALL(128, DCX_SUMS128, "%64", "%65", "%66", "%67", "%68", "%69", DCX_OUTS128)
DCX_WGMMA_ALL(192, DCX_SUMS128 ", " DCX_N64 ", " DCX_N72 ", " DCX_N80 ", " DCX_N88, "%96", "%97", "%98", "%99", "%100",
              "%101", DCX_OUTS192)
#undef DCX_SUMS48
#undef DCX_SUMS96
#undef DCX_SUMS128
#undef DCX_WGMMA_ALL
#undef DCX_WGMMA

#else

template <int kColumns, bool kAdds>
inline void start_sums(float (&d)[kColumns / 2]) {
  if (!kAdds)
    for (float& sum : d) sum = 0.0f;
}
template <class T, int kColumns, bool kAdds>
inline void wgmma_rows(float (&d)[kColumns / 2], Panel a, Panel b) {
  start_sums<kColumns, kAdds>(d);
  wgmma<T, kColumns>(d, a, b);
}

// The warp writes its rows of a into a panel of the emulator's own, as many in turn as products are under way.
template <class T, int kColumns, bool kAdds>
inline void wgmma_hidden(float (&d)[kColumns / 2], const uint32_t (&a)[4], Panel b) {
  start_sums<kColumns, kAdds>(d);
  constexpr int kWarps = 32, kInTurn = 16, kRows = 64;
  alignas(1024) static unsigned char panels[kWarps / 4][kInTurn][kRows * kPanelRowBytes];
  static int turn[kWarps * kWarp];
  const int thread = thread_index(), lane = thread % kWarp;
  unsigned char* panel = panels[thread / (4 * kWarp)][turn[thread]++ % kInTurn];
  sync_warp();  // who still reads the product before last round's has not passed its wait
  for (int i = 0; i < 4; ++i) {
    const int row = thread / kWarp % 4 * 16 + i % 2 * 8 + lane / 4;
    memcpy(panel + panel_cell(row, i / 2) * 16 + lane % 4 * 4, &a[i], 4);
  }
  sync_warp();
  simt::multiply_later(d, panel, b.start, b.panel_bytes, kColumns, [](uint16_t bits) { return to_float(T{bits}); });
}

#endif  // __CUDACC__

}  // namespace dcx
