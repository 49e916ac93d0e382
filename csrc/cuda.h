// What the ops' CUDA halves share. Included where DCX_WITH_CUDA is defined alone.
#pragma once
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include "../kernels/common/conv_gemm_params.h"
#include "checks.h"
#include "counters.h"

namespace dcx {

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Whether torch lets float32 products round to tf32. The older question throws where the newer setting
// (fp32_precision) was used; a torch that has no other question then means no.
inline bool tf32_allowed() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
#else
  try {
    return at::globalContext().allowTF32CuBLAS();
  } catch (const c10::Error&) {
    return false;
  }
#endif
}

// The current stream and device, and what that device allows. Call it under a CUDAGuard for the tensor's device.
inline CudaContext cuda_context() {
  CudaContext context;
  context.stream = c10::cuda::getCurrentCUDAStream().stream();
  context.device = c10::cuda::current_device();
  context.capability = device_attribute(cudaDevAttrComputeCapabilityMajor, context.device) * 10 +
                       device_attribute(cudaDevAttrComputeCapabilityMinor, context.device);
  context.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, context.device);
  context.shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, context.device);
  context.allow_tf32 = tf32_allowed();
#ifdef DCX_WITH_SM90A
  context.wgmma = context.capability == 90;
#endif
  return context;
}

inline void check_cuda_dtype(const char* op, const char* name, const at::Tensor& t) {
  DCX_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf, op, ": ",
            name, " must be float32, bfloat16 or float16 on CUDA, got ", t.scalar_type());
}

// [B] int64 on x's device; undefined when absent. Lengths that lie on the CPU are checked; those on the GPU are not
// read back, since that would wait for it: kernels clamp them to 0..steps.
inline at::Tensor device_lengths(const char* op, const OptionalTensor& lengths, int64_t batch, int64_t steps,
                                 const at::Tensor& x) {
  if (!lengths.has_value() || !lengths->defined()) return at::Tensor();
  if (!lengths->is_cuda()) return check_lengths(op, lengths, batch, steps).to(x.device());
  DCX_CHECK(lengths->dim() == 1 && lengths->size(0) == batch, op, ": lengths must be [B] = [", batch, "], got ",
            shape_text(*lengths));
  DCX_CHECK(lengths->scalar_type() == at::kLong, op, ": lengths must be int64, got ", lengths->scalar_type());
  DCX_CHECK(lengths->device() == x.device(), op, ": lengths must be on ", x.device(), " or the CPU, got ",
            lengths->device());
  return lengths->contiguous();
}

// The packed weight in x's dtype, or the one that `pack` makes now.
template <class Pack>
inline at::Tensor cuda_packed_or(const char* op, const OptionalTensor& packed, int64_t numel, const at::Tensor& x,
                                 const Pack& pack) {
  if (!packed.has_value() || !packed->defined()) return pack();
  DCX_CHECK(packed->dim() == 1 && packed->scalar_type() == x.scalar_type() && packed->is_contiguous() &&
                packed->numel() == numel && packed->device() == x.device() &&
                reinterpret_cast<uintptr_t>(packed->const_data_ptr()) % 16 == 0,
            op, ": packed must be a contiguous ", x.scalar_type(), " tensor of ", numel, " elements on ", x.device(),
            " as made for this weight, got ", packed->scalar_type(), " ", shape_text(*packed), " on ",
            packed->device());
  return *packed;
}

// Whether what a kernel reads is the caller's own tensor, and not one that a kernel in front may still write.
inline bool is_given(const at::Tensor& used, const OptionalTensor& given) {
  return !used.defined() || (given.has_value() && used.is_same(*given));
}

// Starts a planned kernel with workspace from torch's allocator; weights_stand: all weights and vectors are the
// caller's own, which stand since before the kernel in front.
inline void start_plan(const CudaContext& context, ConvGemmPlan& plan, const at::Tensor& x, bool weights_stand) {
  plan.params.weights_stand = weights_stand;
  at::Tensor partial, counters, prepared;
  if (plan.partial_floats > 0) {
    partial = at::empty({plan.partial_floats}, x.options().dtype(at::kFloat));
    counters = take_counters(context, plan.tiles, x);
    plan.params.partial = partial.mutable_data_ptr<float>();
    plan.params.counters = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int32_t>());
  }
  if (plan.prepared_bytes > 0) {
    prepared = at::empty({plan.prepared_bytes}, x.options().dtype(at::kByte));
    plan.prepared.to = prepared.mutable_data_ptr();
    plan.params.x.data = plan.prepared.to;
  }
  plan.start(context, plan);
}

}  // namespace dcx
