// Starting a kernel. A kernel is a struct with Params (plain data), kThreads, kMinBlocks (blocks that should fit on a
// multiprocessor), kNeedsSm80, and static void run(const Params&, unsigned char* smem); run_kernel<K> is its __global__
// function. Without nvcc, launch runs the blocks on the CPU (tests/simt).
#pragma once
#include <stddef.h>

#include <stdexcept>
#include <string>

#include "cuda_context.h"
#include "device.cuh"

namespace dcx {

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Kernels of wgmma.cuh say so by a member kNeedsSm90a; one that calls grid_wait on its own has a member kWaitsItself.
template <class K, class = void>
constexpr bool kNeedsHopper = false;
template <class K>
constexpr bool kNeedsHopper<K, decltype(void(K::kNeedsSm90a))> = true;
template <class K, class = void>
constexpr bool kWaitsAlone = false;
template <class K>
constexpr bool kWaitsAlone<K, decltype(void(K::kWaitsItself))> = true;

// One that should come up beside those in front of it says so by a member kBesideOthers: a multiprocessor's memory is
// parted into cache and shared memory as the first kernel there asks for, and not anew before it is idle, so that a
// block behind waits for that where a part was chosen for smaller ones. Such kernels ask for all of it.
template <class K, class = void>
constexpr bool kComesUpBeside = false;
template <class K>
constexpr bool kComesUpBeside<K, decltype(void(K::kBesideOthers))> = true;

template <class K>
constexpr bool kRunsHere =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    !K::kNeedsSm80;
#elif defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
    !kNeedsHopper<K>;
#else
    true;
#endif

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kMinBlocks) run_kernel(const __grid_constant__ typename K::Params p) {
  extern __shared__ __align__(1024) unsigned char smem[];
  grid_release();
  if constexpr (!kWaitsAlone<K>) grid_wait();
  if constexpr (kRunsHere<K>) K::run(p, smem);
}

// clustered: the blocks of one x and y, up to 8, are a cluster: from capability 9.0 on.
template <class K>
void launch(const CudaContext& context, const typename K::Params& p, Grid grid, int64_t smem_bytes,
            bool clustered = false) {
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  constexpr int kDevices = 64;
  static int raised[kDevices] = {};  // a race sets the same attribute twice, which is harmless
  if (smem_bytes > 48 * 1024 && (context.device >= kDevices || raised[context.device] < context.shared_bytes)) {
    check_cuda(cudaFuncSetAttribute(run_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, context.shared_bytes),
               "shared memory");
    if (context.device < kDevices) raised[context.device] = context.shared_bytes;
  }
  if constexpr (kComesUpBeside<K>) {
    static bool parted[kDevices] = {};
    if (context.device >= kDevices || !parted[context.device]) {
      check_cuda(cudaFuncSetAttribute(run_kernel<K>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared),
                 "shared memory's part");
      if (context.device < kDevices) parted[context.device] = true;
    }
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  // From 9.0 on a kernel is brought to its start while the one in front of it in the stream still runs: see grid_wait.
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (context.capability >= 90 && CUDART_VERSION >= 12030) {  // older ones can't record it
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (clustered) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {1, 1, static_cast<unsigned>(grid.z)};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(K::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  check_cuda(cudaLaunchKernelEx(&config, run_kernel<K>, p), "kernel launch");
}

#else

template <class K>
void launch(const CudaContext& context, const typename K::Params& p, Grid grid, int64_t smem_bytes,
            bool clustered = false) {
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  if (smem_bytes > context.shared_bytes) throw std::runtime_error("more shared memory than a block may ask for");
  simt::run_grid<K>(p, grid.x, grid.y, grid.z, smem_bytes, clustered ? grid.z : 1);
}

#endif  // __CUDACC__

}  // namespace dcx
