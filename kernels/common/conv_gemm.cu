#include "conv_gemm_launch.cuh"
