// Argument checks and the small conversions that every op shares. A failed check is one line:
// "op: argument must be <what is needed>, got <what came>", raised as ValueError.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "../kernels/common/dtype.h"

#define DCX_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

namespace dcx {

using OptionalTensor = std::optional<at::Tensor>;

inline std::string shape_text(const at::Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline bool is_compute_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// What kernels accumulate in, and what vectors and packed quantisers are stored in.
inline at::ScalarType accumulate_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// What CPU kernels for signals of this dtype want the weights of convolutions packed in.
inline at::ScalarType packed_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? at::kBFloat16 : accumulate_dtype(dtype);
}

inline DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble     ? DType::kF64
         : dtype == at::kBFloat16 ? DType::kBF16
         : dtype == at::kHalf     ? DType::kF16
                                  : DType::kF32;
}

inline void check_float(const char* op, const char* name, const at::Tensor& t) {
  DCX_CHECK(is_compute_dtype(t.scalar_type()), op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
            t.scalar_type());
}

// A [B, C, T] signal.
inline void check_signal(const char* op, const char* name, const at::Tensor& t) {
  DCX_CHECK(t.dim() == 3, op, ": ", name, " must be [B, C, T], got ", shape_text(t));
  check_float(op, name, t);
}

// A tensor of the exact shape, of any supported float type, on x's device.
inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape,
                        const char* needed, const at::Tensor& x) {
  DCX_CHECK(t.sizes() == shape, op, ": ", name, " must be ", needed, " = ", shape, ", got ", shape_text(t));
  check_float(op, name, t);
  DCX_CHECK(t.device() == x.device(), op, ": ", name, " must be on ", x.device(), " as the input is, got ", t.device());
}

// The [C] vector in the accumulation type, contiguous; an undefined tensor stays undefined.
inline at::Tensor small_vector(const char* op, const char* name, const OptionalTensor& t, int64_t size,
                               const at::Tensor& x) {
  if (!t.has_value() || !t->defined()) return at::Tensor();
  check_shape(op, name, *t, {size}, "[C]", x);
  const at::ScalarType dtype = accumulate_dtype(x.scalar_type());
  if (t->scalar_type() == dtype && t->is_contiguous()) return *t;
  return t->detach().to(dtype).contiguous();
}

// A bias padded with zeros to a multiple of kColumnUnit; zeros when there is none. Not copied where it is as it must
// be: a copy costs as much as a narrow layer's few rows.
inline at::Tensor padded_bias(const char* op, const char* name, const OptionalTensor& t, int64_t size,
                              const at::Tensor& x) {
  const at::Tensor values = small_vector(op, name, t, size, x);
  if (values.defined() && size % kColumnUnit == 0) return values;
  at::Tensor padded = at::zeros({round_up(size, kColumnUnit)}, x.options().dtype(accumulate_dtype(x.scalar_type())));
  if (values.defined() && size > 0) padded.narrow(0, 0, size).copy_(values.detach());
  return padded;
}

// [B] int64 on the CPU, each in [0, T]; undefined when absent.
inline at::Tensor check_lengths(const char* op, const OptionalTensor& lengths, int64_t batch, int64_t steps) {
  if (!lengths.has_value() || !lengths->defined()) return at::Tensor();
  DCX_CHECK(lengths->dim() == 1 && lengths->size(0) == batch, op, ": lengths must be [B] = [", batch, "], got ",
            shape_text(*lengths));
  DCX_CHECK(lengths->scalar_type() == at::kLong, op, ": lengths must be int64, got ", lengths->scalar_type());
  const at::Tensor host = lengths->to(at::kCPU).contiguous();
  const int64_t* values = host.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b)
    DCX_CHECK(values[b] >= 0 && values[b] <= steps, op, ": lengths[", b, "] must be in 0..", steps, ", got ",
              values[b]);
  return host;
}

inline void check_padding(const char* op, at::IntArrayRef padding) {
  DCX_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op,
            ": padding must be two non-negative integers (left, right), got ", padding);
}

// With one channel the strides tell too: a contiguous [B, 1, T] has stride T there.
inline bool is_channels_last(const at::Tensor& x) { return x.dim() == 3 && x.stride(1) == 1; }

// An uninitialised [B, C, T], with stride 1 on C when channels_last.
inline at::Tensor empty_signal(int64_t batch, int64_t channels, int64_t steps, const at::TensorOptions& options,
                               bool channels_last) {
  if (channels_last) return at::empty({batch, steps, channels}, options).transpose(1, 2);
  return at::empty({batch, channels, steps}, options);
}

// What an op writes: `out` where it is given, once checked, or an uninitialised [B, C, T] laid out as x is.
inline at::Tensor output_signal(const char* op, const OptionalTensor& out, int64_t batch, int64_t channels,
                                int64_t steps, const at::Tensor& x) {
  if (!out.has_value()) return empty_signal(batch, channels, steps, x.options(), is_channels_last(x));
  DCX_CHECK(out->sizes() == at::IntArrayRef({batch, channels, steps}), op, ": out must be [B, C, T'] = [", batch, ", ",
            channels, ", ", steps, "], got ", shape_text(*out));
  DCX_CHECK(out->scalar_type() == x.scalar_type(), op, ": out must be ", x.scalar_type(), " as the input is, got ",
            out->scalar_type());
  DCX_CHECK(out->device() == x.device(), op, ": out must be on ", x.device(), " as the input is, got ", out->device());
  return *out;
}

// The two overloads of an op that `kImpl`, which takes `out` first, stands behind: op(..) and op.out(.., *, out).
template <auto kImpl>
struct WithOut;
template <class... Args, at::Tensor (*kImpl)(const OptionalTensor&, Args...)>
struct WithOut<kImpl> {
  static at::Tensor functional(Args... args) { return kImpl(std::nullopt, args...); }
  static void out(Args... args, at::Tensor& out) { kImpl(out, args...); }
};

inline TensorView view_of(const at::Tensor& t) {
  TensorView view;
  view.data = const_cast<void*>(t.const_data_ptr());
  view.dtype = kernel_dtype(t.scalar_type());
  view.stride_b = t.stride(0);
  view.stride_c = t.stride(1);
  view.stride_t = t.stride(2);
  return view;
}

// The packed weight, or the one that `pack` makes now.
template <class Pack>
inline at::Tensor packed_or(const char* op, const OptionalTensor& packed, int64_t numel, at::ScalarType dtype,
                            const Pack& pack) {
  if (!packed.has_value() || !packed->defined()) return pack().to(dtype);
  // Other families pack with other layouts and more dims.
  const bool fits = packed->dim() == 1 && packed->numel() == numel && packed->is_contiguous();
  DCX_CHECK(fits && packed->scalar_type() == dtype, op, ": packed must be a contiguous ", dtype, " tensor of ", numel,
            " elements as made for this weight, got ", packed->scalar_type(), " ", shape_text(*packed));
  return *packed;
}

template <class T>
inline const T* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

}  // namespace dcx
