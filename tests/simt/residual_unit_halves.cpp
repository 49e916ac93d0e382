#define DCX_HALVES
#include "residual_unit.cpp"
