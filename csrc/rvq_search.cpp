#include "../kernels/rvq_search/params.h"

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../kernels/common/gemm_pack.h"
#include "rvq.h"

namespace dcx {
namespace {

RvqSearchCounts search_counts{};
double search_bound_factor = 1, search_slack_factor = 1;

// In the type to pack in first: what float32 codes are searched for with are float32 weights, in every part.
template <class T>
at::Tensor as_double(const at::Tensor& t) {
  const at::Tensor kept = t.detach().to(at::Device(at::kCPU), c10::CppTypeToScalarType<T>::value);
  return kept.to(at::kDouble).contiguous();
}

// The normalised rows in bytes, and how far they are from those at most. That is infinite where a row is shorter than
// one or not finite: the first pass compares products alone.
void pack_coarse(float* packed, const RvqLayout& layout, int64_t stage) {
  const int64_t dim = layout.dim;
  uint8_t* out = reinterpret_cast<uint8_t*>(packed + layout.coarse_books() + stage * layout.coarse_size());
  const float* book = packed + layout.books() + stage * layout.book_size();
  double worst = 0;
  for (int64_t n = 0; n < layout.coarse_passes() * kCoarseRows; ++n) {
    // Behind the last row it is repeated, in its group and in groups that no search looks at.
    const int64_t row = std::min(n, layout.entries - 1), group = n / kCodeGroup;
    const int64_t place = group / kCoarseGroups * kCodeGroup + n % kCodeGroup;
    const float* values = book + row / kCodeGroup * (dim + 1) * kCodeGroup + row % kCodeGroup;
    if (!(std::abs(static_cast<double>(values[0]) - 1) <= 1e-6)) {
      worst = std::numeric_limits<double>::infinity();
      break;
    }
    double square = 0;
    int bytes[kCoarseDim];
    for (int64_t d = 0; d < kCoarseDim; ++d) {
      const double value = d < dim ? kCoarseScale * static_cast<double>(values[(d + 1) * kCodeGroup]) : 0;
      bytes[d] = 128 + static_cast<int>(std::nearbyint(value));
      // Four bytes that would be a float NaN, which no comparison of packed weights would find equal to itself.
      if (d % 4 == 3 && bytes[d] % 128 == 127 && bytes[d - 1] >= 128)
        bytes[d] += bytes[d] == 127 && value > bytes[d] - 128 ? 1 : -1;
      out[((2 * place + d / 4) * kCoarseGroups + group % kCoarseGroups) * 4 + d % 4] = static_cast<uint8_t>(bytes[d]);
      const double off = (value - (bytes[d] - 128)) / kCoarseScale;
      square += off * off;
    }
    worst = std::max(worst, std::sqrt(square));
  }
  packed[layout.coarse_errors() + stage] = static_cast<float>(worst * (1 + 0x1p-20));
}
void pack_coarse(double*, const RvqLayout&, int64_t) {}

// Everything is computed in double by plain loops, so that a packed weight does not depend on the number of threads.
template <class T>
void pack_into(T* out, const RvqLayout& layout, const at::Tensor& in_weight, const at::Tensor& in_bias,
               const at::Tensor& codebooks, const at::Tensor& out_weight, const at::Tensor& out_bias) {
  const int64_t stages = layout.stages, entries = layout.entries, dim = layout.dim, channels = layout.channels;
  const at::Tensor books_tensor = as_double<T>(codebooks), v_tensor = as_double<T>(out_weight),
                   b_tensor = as_double<T>(out_bias);
  const double* books = books_tensor.const_data_ptr<double>();
  const double* v = v_tensor.const_data_ptr<double>();
  const double* b = b_tensor.const_data_ptr<double>();

  // Rounded up: these norms go into a bound.
  const auto above = [](double value) { return static_cast<T>(value * (1 + 0x1p-20)); };
  const auto norm_of = [](const double* values, int64_t count) {
    double square = 0;
    for (int64_t i = 0; i < count; ++i) square += values[i] * values[i];
    return std::sqrt(square);
  };
  // The folded bias and W_i V_j are sums over the channels in double: their error, in float32 roundings per |W| |V|.
  const double fold_error = static_cast<double>(channels + 2) * 0x1p-29;

  if (in_weight.defined()) {
    const at::Tensor w_tensor = as_double<T>(in_weight), in_bias_tensor = as_double<T>(in_bias);
    const double* w = w_tensor.const_data_ptr<double>();
    pack_panels(out + layout.in_panels(), w, 1, channels, stages * dim, 0, 1, channels);
    for (int64_t i = 0; i < stages; ++i) {
      T* norms = out + layout.norms_of(i);
      const double w_norm = norm_of(w + i * dim * channels, dim * channels);
      double bias_square = 0, b_norm = 0;
      std::vector<double> cross_square(static_cast<size_t>(i));
      for (int64_t d = 0; d < dim; ++d) {
        const double* row = w + (i * dim + d) * channels;
        double bias = in_bias_tensor.const_data_ptr<double>()[i * dim + d];
        for (int64_t j = 0; j < i; ++j) {
          for (int64_t c = 0; c < channels; ++c) bias -= row[c] * b[j * channels + c];
          for (int64_t k = 0; k < dim; ++k) {
            double sum = 0;
            for (int64_t c = 0; c < channels; ++c) sum += row[c] * v[(j * channels + c) * dim + k];
            cross_square[static_cast<size_t>(j)] += sum * sum;
            out[layout.cross() + ((i * stages + j) * dim + d) * dim + k] = static_cast<T>(sum);
          }
        }
        bias_square += bias * bias;
        out[layout.in_bias() + i * dim + d] = static_cast<T>(bias);
        out[layout.plain_in_bias() + i * dim + d] =
            static_cast<T>(in_bias_tensor.const_data_ptr<double>()[i * dim + d]);
      }
      for (int64_t j = 0; j < i; ++j) {
        const double v_norm = norm_of(v + j * channels * dim, channels * dim);
        norms[2 + j] = above(std::sqrt(cross_square[static_cast<size_t>(j)]) + fold_error * w_norm * v_norm);
        b_norm += norm_of(b + j * channels, channels);
      }
      norms[0] = above(w_norm);
      norms[1] = above(std::sqrt(bias_square) + fold_error * w_norm * b_norm);
    }
  }

  std::vector<double> normalised(static_cast<size_t>(dim));
  for (int64_t i = 0; i < stages; ++i) {
    T* book = out + layout.books() + i * layout.book_size();
    for (int64_t n = 0; n < layout.groups() * kCodeGroup; ++n) {
      T* group = book + n / kCodeGroup * (dim + 1) * kCodeGroup + n % kCodeGroup;
      if (n >= entries) {
        group[0] = std::numeric_limits<T>::infinity();
        continue;
      }
      const double* row = books + (i * entries + n) * dim;
      double square = 0, kept = 0;
      for (int64_t d = 0; d < dim; ++d) square += row[d] * row[d];
      const double scale = std::max(std::sqrt(square), 1e-12);
      for (int64_t d = 0; d < dim; ++d) {
        const T value = static_cast<T>(row[d] / scale);
        group[(d + 1) * kCodeGroup] = value;
        kept += static_cast<double>(value) * static_cast<double>(value);
      }
      group[0] = static_cast<T>(kept);
    }
    pack_coarse(out, layout, i);
    for (int64_t n = 0; n < entries * dim; ++n)
      out[layout.rows() + i * entries * dim + n] = static_cast<T>(books[i * entries * dim + n]);
  }

  // [Q D] x C: the reduction runs over (stage, dim), whose stride is that of a [Q, C, D] tensor brought to [Q, D, C].
  const at::Tensor reduction_first = v_tensor.transpose(1, 2).contiguous();
  pack_panels(out + layout.out_panels(), reduction_first.const_data_ptr<double>(), 1, stages * dim, channels, 0,
              channels, int64_t{1});
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < stages; ++i) {
      sum += b[i * channels + c];
      out[layout.plain_out_bias() + i * layout.channel_columns() + c] = static_cast<T>(b[i * channels + c]);
      out[layout.out_bias() + i * layout.channel_columns() + c] = static_cast<T>(sum);
    }
  }
}

at::Tensor pack_rvq(const at::Tensor& in_weight,   // [Q, D, C]
                    const at::Tensor& in_bias,     // [Q, D]
                    const at::Tensor& codebooks,   // [Q, N, D]
                    const at::Tensor& out_weight,  // [Q, C, D]
                    const at::Tensor& out_bias) {  // [Q, C]
  const char* op = "pack_rvq";
  const RvqLayout layout = check_quantizer(op, codebooks, out_weight, out_bias, codebooks);
  check_shape(op, "in_weight", in_weight, {layout.stages, layout.dim, layout.channels}, "[Q, D, C]", codebooks);
  check_shape(op, "in_bias", in_bias, {layout.stages, layout.dim}, "[Q, D]", codebooks);
  return pack_quantizer(layout, in_weight, in_bias, codebooks, out_weight, out_bias,
                        accumulate_dtype(codebooks.scalar_type()));
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Checks every argument but the lengths and the packed weight, and fills in what does not depend on the device.
RvqSearchParams check_rvq_search(const at::Tensor& z, const at::Tensor& in_weight, const at::Tensor& in_bias,
                                 const at::Tensor& codebooks, const at::Tensor& out_weight, const at::Tensor& out_bias,
                                 int64_t num_quantizers) {
  const char* op = "rvq_search";
  check_signal(op, "z", z);
  const RvqLayout layout = check_quantizer(op, codebooks, out_weight, out_bias, z);
  DCX_CHECK(z.size(1) == layout.channels, op, ": z must be [B, C, F] with C = ", layout.channels, ", got ",
            shape_text(z));
  check_shape(op, "in_weight", in_weight, {layout.stages, layout.dim, layout.channels}, "[Q, D, C]", z);
  check_shape(op, "in_bias", in_bias, {layout.stages, layout.dim}, "[Q, D]", z);
  DCX_CHECK(num_quantizers >= 1 && num_quantizers <= layout.stages, op, ": num_quantizers must be in 1..",
            layout.stages, ", got ", num_quantizers);
  RvqSearchParams p{};
  p.layout = layout;
  p.batch = z.size(0);
  p.frames = z.size(2);
  p.used = num_quantizers;
  p.z = view_of(z);
  return p;
}

// Allocates the outputs, completes p with them and launches, unless they are empty.
template <class Launch>
Outputs search_into_outputs(RvqSearchParams p, const at::Tensor& z, bool return_quantized, bool return_margin,
                            const Launch& launch) {
  const at::TensorOptions options = z.options();
  const at::TensorOptions wide = options.dtype(accumulate_dtype(z.scalar_type()));
  at::Tensor codes = at::empty({p.batch, p.used, p.frames}, options.dtype(at::kLong));
  at::Tensor quantized = return_quantized
                             ? empty_signal(p.batch, p.layout.channels, p.frames, options, is_channels_last(z))
                             : at::empty({0}, options);
  at::Tensor margin = return_margin ? at::empty({p.batch, p.used, p.frames}, wide) : at::empty({0}, wide);
  if (codes.numel() == 0) return {codes, quantized, margin};
  p.codes = codes.mutable_data_ptr<int64_t>();
  if (return_quantized) p.quantized = view_of(quantized);
  if (return_margin) p.margin = margin.mutable_data_ptr();
  launch(p);
  return {codes, quantized, margin};
}

Outputs rvq_search_cpu(const at::Tensor& z,           // [B, C, F] f32|f64|bf16|f16
                       const at::Tensor& in_weight,   // [Q, D, C]
                       const at::Tensor& in_bias,     // [Q, D]
                       const at::Tensor& codebooks,   // [Q, N, D]
                       const at::Tensor& out_weight,  // [Q, C, D]
                       const at::Tensor& out_bias,    // [Q, C]
                       int64_t num_quantizers, bool return_quantized, bool return_margin,
                       const OptionalTensor& lengths,   // [B] i64
                       const OptionalTensor& packed) {  // as pack_rvq made it
  const char* op = "rvq_search";
  RvqSearchParams p = check_rvq_search(z, in_weight, in_bias, codebooks, out_weight, out_bias, num_quantizers);
  const at::Tensor length_values = check_lengths(op, lengths, p.batch, p.frames);
  const at::Tensor values = packed_or(op, packed, p.layout.total(), accumulate_dtype(z.scalar_type()), [&] {
    return pack_quantizer(p.layout, in_weight, in_bias, codebooks, out_weight, out_bias,
                          accumulate_dtype(z.scalar_type()));
  });
  p.packed = values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  p.counts = &search_counts;
  p.bound_factor = search_bound_factor;
  p.slack_factor = search_slack_factor;
  return search_into_outputs(p, z, return_quantized, return_margin, launch_rvq_search_cpu);
}

#ifdef DCX_WITH_CUDA

at::Tensor pack_rvq_cuda(const at::Tensor& in_weight, const at::Tensor& in_bias, const at::Tensor& codebooks,
                         const at::Tensor& out_weight, const at::Tensor& out_bias) {
  check_cuda_dtype("pack_rvq", "codebooks", codebooks);
  const c10::cuda::CUDAGuard guard(codebooks.device());
  return pack_rvq(in_weight, in_bias, codebooks, out_weight, out_bias);
}

Outputs rvq_search_cuda(const at::Tensor& z, const at::Tensor& in_weight, const at::Tensor& in_bias,
                        const at::Tensor& codebooks, const at::Tensor& out_weight, const at::Tensor& out_bias,
                        int64_t num_quantizers, bool return_quantized, bool return_margin,
                        const OptionalTensor& lengths, const OptionalTensor& packed) {
  const char* op = "rvq_search";
  RvqSearchParams p = check_rvq_search(z, in_weight, in_bias, codebooks, out_weight, out_bias, num_quantizers);
  check_cuda_dtype(op, "z", z);
  const c10::cuda::CUDAGuard guard(z.device());
  const at::Tensor length_values = device_lengths(op, lengths, p.batch, p.frames, z);
  const at::Tensor values = cuda_packed_quantizer(op, packed, p.layout, z, [&] {
    return pack_quantizer(p.layout, in_weight, in_bias, codebooks, out_weight, out_bias, at::kFloat);
  });
  p.packed = values.const_data_ptr();
  p.lengths = data_or_null<int64_t>(length_values);
  return search_into_outputs(p, z, return_quantized, return_margin,
                             [](const RvqSearchParams& whole) { launch_rvq_search_cuda(cuda_context(), whole); });
}

#endif  // DCX_WITH_CUDA

}  // namespace

std::pair<int64_t, int64_t> rvq_search_counts(bool reset) {
  int64_t values[2] = {0, 0};
  int64_t* const kept[2] = {&search_counts.codes, &search_counts.redone};
  for (int i = 0; i < 2; ++i)
    values[i] = reset ? __atomic_exchange_n(kept[i], 0, __ATOMIC_RELAXED) : __atomic_load_n(kept[i], __ATOMIC_RELAXED);
  return {values[0], values[1]};
}

void set_rvq_search_bound_factor(double factor) { search_bound_factor = factor; }
void set_rvq_search_slack_factor(double factor) { search_slack_factor = factor; }

at::Tensor pack_quantizer(const RvqLayout& layout, const at::Tensor& in_weight, const at::Tensor& in_bias,
                          const at::Tensor& codebooks, const at::Tensor& out_weight, const at::Tensor& out_bias,
                          at::ScalarType dtype) {
  at::Tensor packed = at::zeros({layout.total()}, codebooks.options().dtype(dtype).device(at::kCPU));
  if (dtype == at::kDouble)
    pack_into(packed.mutable_data_ptr<double>(), layout, in_weight, in_bias, codebooks, out_weight, out_bias);
  else
    pack_into(packed.mutable_data_ptr<float>(), layout, in_weight, in_bias, codebooks, out_weight, out_bias);
  return packed.to(codebooks.device());
}

}  // namespace dcx

TORCH_LIBRARY_IMPL(dualcodec_ext, CPU, m) {
  m.impl("rvq_search", dcx::rvq_search_cpu);
  m.impl("pack_rvq", dcx::pack_rvq);
}

#ifdef DCX_WITH_CUDA
TORCH_LIBRARY_IMPL(dualcodec_ext, CUDA, m) {
  m.impl("rvq_search", dcx::rvq_search_cuda);
  m.impl("pack_rvq", dcx::pack_rvq_cuda);
}
#endif
