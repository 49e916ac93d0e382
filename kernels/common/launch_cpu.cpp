// launch_<op>_cpu: the kernel of the active instruction set.
#include "../causal_dwconv1d/params.h"
#include "../conformer/params.h"
#include "../residual_unit/params.h"
#include "../rvq_lookup/params.h"
#include "../rvq_search/params.h"
#include "../snake_conv1d/params.h"
#include "../snake_upsample1d/params.h"
#include "runtime.h"

#ifdef DCX_X86
#define DCX_X86_DECLARE(op, Params) \
  namespace avx2 {                  \
  void op(const Params&);           \
  }                                 \
  namespace avx512 {                \
  void op(const Params&);           \
  }                                 \
  namespace avx512_bf16 {           \
  void op(const Params&);           \
  }                                 \
  namespace amx_bf16 {              \
  void op(const Params&);           \
  }
#define DCX_X86_SELECT(op, params)        \
  if (active_isa() == Isa::kAmxBf16) {    \
    amx_bf16::op(params);                 \
    return;                               \
  }                                       \
  if (active_isa() == Isa::kAvx512Bf16) { \
    avx512_bf16::op(params);              \
    return;                               \
  }                                       \
  if (active_isa() == Isa::kAvx512) {     \
    avx512::op(params);                   \
    return;                               \
  }                                       \
  if (active_isa() == Isa::kAvx2) {       \
    avx2::op(params);                     \
    return;                               \
  }
#else
#define DCX_X86_DECLARE(op, Params)
#define DCX_X86_SELECT(op, params)
#endif

#define DCX_LAUNCH_CPU(op, Params)               \
  namespace dcx {                                \
  namespace generic {                            \
  void op(const Params&);                        \
  }                                              \
  DCX_X86_DECLARE(op, Params)                    \
  void launch_##op##_cpu(const Params& params) { \
    DCX_X86_SELECT(op, params)                   \
    generic::op(params);                         \
  }                                              \
  }

DCX_LAUNCH_CPU(causal_dwconv1d, CausalDwconv1dParams)
DCX_LAUNCH_CPU(conformer_attention, ConformerAttentionParams)
DCX_LAUNCH_CPU(conformer_convolution, ConformerConvolutionParams)
DCX_LAUNCH_CPU(conformer_linear, ConformerLinearParams)
DCX_LAUNCH_CPU(conformer_norm, ConformerNormParams)
DCX_LAUNCH_CPU(residual_unit, ResidualUnitParams)
DCX_LAUNCH_CPU(rvq_lookup, RvqLookupParams)
DCX_LAUNCH_CPU(rvq_search, RvqSearchParams)
DCX_LAUNCH_CPU(snake_conv1d, SnakeConv1dParams)
DCX_LAUNCH_CPU(snake_upsample1d, SnakeUpsample1dParams)
