#define DCX_GROUP_KERNELS
#include "residual_unit.cpp"
