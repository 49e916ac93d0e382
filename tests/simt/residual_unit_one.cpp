#define DCX_ONE_KERNEL dcx::FusedKernels<dcx::bf16, 48>::Short
#include "residual_unit.cpp"
