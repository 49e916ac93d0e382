// The helpers of kernels/common, on every instruction set that this machine has. The checks are in common_checks.cpp,
// compiled once per set; this file is not, so that it runs anywhere.
#include <cstdio>

#include "common/runtime.h"

namespace dcx {
namespace generic {
void check_common();
}
#ifdef DCX_X86
namespace avx2 {
void check_common();
}
namespace avx512 {
void check_common();
}
namespace avx512_bf16 {
void check_common();
}
namespace amx_bf16 {
void check_common();
}
#endif
}  // namespace dcx

int main() {
  dcx::generic::check_common();
  int sets = 1;
#ifdef DCX_X86
  if (dcx::isa_detected(dcx::Isa::kAvx2)) {
    dcx::avx2::check_common();
    ++sets;
  }
  if (dcx::isa_detected(dcx::Isa::kAvx512)) {
    dcx::avx512::check_common();
    ++sets;
  }
  if (dcx::isa_detected(dcx::Isa::kAvx512Bf16)) {
    dcx::avx512_bf16::check_common();
    ++sets;
  }
  if (dcx::isa_detected(dcx::Isa::kAmxBf16)) {
    dcx::amx_bf16::check_common();
    ++sets;
  }
#endif
  std::printf("common: passed on %d instruction sets\n", sets);
  return 0;
}
