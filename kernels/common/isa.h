// The instruction set that the including unit is compiled for. A `*_cpu.cpp` file is compiled once per set, with
// -DDCX_ISA=<n> and the flags of kernels/sources.json; everything it defines lives in namespace dcx::DCX_NS.
// Such a unit includes no C++ standard-library template: an inline function that the linker merges across units
// could carry instructions that the machine lacks.
#pragma once

#ifndef DCX_ISA
#error "compile kernel units with -DDCX_ISA=0 (generic), 1 (avx2), 2 (avx512), 3 (avx512_bf16) or 4 (amx_bf16)"
#endif

#if DCX_ISA == 0
#define DCX_NS generic
#define DCX_VECTOR_BYTES 16
#elif DCX_ISA == 1
#define DCX_NS avx2
#define DCX_VECTOR_BYTES 32
#elif DCX_ISA == 2
#define DCX_NS avx512
#define DCX_VECTOR_BYTES 64
#elif DCX_ISA == 3
#define DCX_NS avx512_bf16
#define DCX_VECTOR_BYTES 64
#elif DCX_ISA == 4
#define DCX_NS amx_bf16
#define DCX_VECTOR_BYTES 64
#else
#error "unknown DCX_ISA"
#endif
