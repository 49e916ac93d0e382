// Every op schema, and the Python module that carries them. Implementations register themselves in <op>.cpp.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "../kernels/common/runtime.h"
#include "program.h"
#include "replay.h"
#include "rvq.h"
#include "snapshot.h"

namespace {

// An op, and the same into memory that the caller has: name.out(.., *, out) -> (). An op that returned `out` would be
// none that torch.compile takes.
void define_with_out(torch::Library& m, const std::string& name, const std::string& arguments,
                     const std::string& more = "") {
  m.def((name + "(" + arguments + ") -> Tensor").c_str());
  m.def((name + ".out(" + arguments + ", *, " + more + "Tensor(a!) out) -> ()").c_str());
}

}  // namespace

TORCH_LIBRARY(dualcodec_ext, m) {
  define_with_out(m, "causal_dwconv1d",
                  "Tensor x, Tensor weight, Tensor? bias, int[] padding, Tensor? ln_weight, Tensor? ln_bias, float "
                  "eps, Tensor? lengths");
  // A Conformer layer's parts, on the CPU alone: `_w2v_layers.py` runs on them.
  m.def("conformer_attention(Tensor projected, Tensor distances, int heads, int left, Tensor? valid) -> Tensor");
  m.def(
      "conformer_convolution(Tensor x, Tensor weight, Tensor ln_weight, Tensor ln_bias, float eps, Tensor? valid) -> "
      "Tensor");
  m.def("conformer_linear(Tensor x, Tensor packed, Tensor? bias, int columns, bool swish) -> Tensor");
  m.def("conformer_linear_add(Tensor(a!) sum, Tensor x, Tensor packed, Tensor? bias, float alpha) -> ()");
  m.def(
      "conformer_norm(Tensor(a!) x, Tensor? addend, float alpha, Tensor weight, Tensor bias, float eps, ScalarType "
      "dtype, Tensor? next_weight=None, Tensor? next_bias=None) -> Tensor");
  m.def("pack_conv1d(Tensor weight, int stride=1, int dilation=1) -> Tensor");
  m.def("pack_residual_unit(Tensor weight1, Tensor weight2, int winograd=0) -> Tensor");
  m.def("pack_rvq(Tensor in_weight, Tensor in_bias, Tensor codebooks, Tensor out_weight, Tensor out_bias) -> Tensor");
  m.def("pack_upsample1d(Tensor weight, int stride, str mode, int[] padding, int winograd=0) -> Tensor");
  // `snaked`: x through alpha1's Snake, as the pair of the layer in front has it.
  const std::string unit =
      "Tensor x, Tensor alpha1, Tensor weight1, Tensor? bias1, Tensor alpha2, Tensor weight2, Tensor? bias2, int "
      "dilation, int[] padding, bool causal, Tensor? lengths, Tensor? packed";
  define_with_out(m, "residual_unit", unit + ", int winograd=0, Tensor? out_alpha=None, Tensor? snaked=None");
  // y, and y through out_alpha's Snake: on CUDA alone, as `snaked`.
  m.def(
      ("residual_unit_pair(" + unit + ", int winograd, Tensor out_alpha, Tensor? snaked) -> (Tensor, Tensor)").c_str());
  define_with_out(m, "rvq_lookup",
                  "Tensor codes, Tensor codebooks, Tensor out_weight, Tensor out_bias, Tensor? addend, Tensor? "
                  "lengths, bool channels_last, Tensor? packed",
                  "Tensor(b!)? error=None, ");
  m.def(
      "rvq_search(Tensor z, Tensor in_weight, Tensor in_bias, Tensor codebooks, Tensor out_weight, Tensor out_bias, "
      "int num_quantizers, bool return_quantized, bool return_margin, Tensor? lengths, Tensor? packed) -> (Tensor "
      "codes, Tensor quantized, Tensor margin)");
  define_with_out(m, "snake_conv1d",
                  "Tensor x, Tensor weight, Tensor? bias, Tensor? alpha, int stride, int dilation, int[] padding, str "
                  "activation, Tensor? residual, Tensor? lengths, Tensor? packed");
  // Runs of every row, on CUDA alone: kernels/stream_rows/README.md.
  m.def(
      "stream_rows(Tensor(a!) to, Tensor source, int[] to_at, int[] source_at, int[] counts, Tensor? kept, Tensor(b!)? "
      "error) -> ()");
  // Codes on their way to a recording's inputs [B, q, W], on CUDA alone: kernels/take_codes/README.md.
  m.def(
      "take_codes(Tensor(a!) to, Tensor codes, int entries, Tensor(b!)? more_to, Tensor? more_codes, int more_entries, "
      "Tensor(c!) wrong) -> ()");
  // With `first` the output begins at that step and is as long as `out`: a stretch of an upsampling.
  const std::string upsample =
      "Tensor x, Tensor? alpha, Tensor weight, Tensor? bias, int stride, str mode, int[] padding, Tensor? lengths, "
      "Tensor? packed, ";
  define_with_out(m, "snake_upsample1d", upsample + "int winograd=0", "int first, ");
  m.def(("snake_upsample1d_pair(" + upsample + "int winograd, Tensor out_alpha) -> (Tensor, Tensor)").c_str());
}

namespace {

void torch_start(int64_t threads, void (*worker)(int64_t, void*), void* context) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(i, context);
  });
}

void torch_parallel_for(int64_t count, void (*fn)(int64_t, int64_t, void*), void* context) {
  dcx::share_out(count, at::in_parallel_region() ? 1 : at::get_num_threads(), torch_start, fn, context);
}

#ifndef _OPENMP
#error "compile csrc with -fopenmp: without it at::parallel_for is a loop on one thread"
#endif

int torch_num_threads() { return at::get_num_threads(); }

#ifdef CPUBLAS_BRGEMM_F32F32F32
void torch_brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_c, const float* a,
                  const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add_c, a, b, c, false);
}
dcx::SmallGemm library_gemm() { return torch_brgemm; }
#else
dcx::SmallGemm library_gemm() { return nullptr; }
#endif

bool set_gemm(const std::string& name) {
  if (name == "own") {
    dcx::runtime().small_gemm = nullptr;
    return true;
  }
  if (name != "brgemm" || library_gemm() == nullptr) return false;
  dcx::runtime().small_gemm = library_gemm();
  return true;
}

bool set_isa(const std::string& name) {
  for (dcx::Isa isa : dcx::kAllIsas)
    if (name == dcx::isa_name(isa)) return dcx::set_active_isa(isa);
  return false;
}

pybind11::dict cpu_features() {
  pybind11::dict features;
  for (dcx::Isa isa : dcx::kAllIsas) {
    pybind11::dict entry;
    entry["compiled"] = dcx::isa_compiled(isa);
    entry["detected"] = dcx::isa_detected(isa);
    features[dcx::isa_name(isa)] = entry;
  }
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled ops of dualcodec_ext; they are called through torch.ops.dualcodec_ext.";
  dcx::runtime().parallel_for = torch_parallel_for;
  dcx::runtime().num_threads = torch_num_threads;
  if (const char* gemm = std::getenv("DUALCODEC_EXT_GEMM"); gemm != nullptr && *gemm != '\0')
    TORCH_CHECK_VALUE(set_gemm(gemm), "DUALCODEC_EXT_GEMM must be own or, where torch has it, brgemm, got ", gemm);
  m.def("cpu_features", &cpu_features, "Instruction sets: {name: {compiled, detected}}.");
  m.def("active_isa", [] { return std::string(dcx::isa_name(dcx::active_isa())); }, "The instruction set in use.");
  m.def(
      "active_isa_error", [] { return std::string(dcx::active_isa_error()); },
      "Why DUALCODEC_EXT_ISA was not followed; empty when it was.");
  m.def("set_isa", &set_isa,
        "Switches kernels to generic, avx2, avx512, avx512_bf16 or amx_bf16; False when that can't run here.");
  m.def("rvq_search_counts", &dcx::rvq_search_counts, pybind11::arg("reset"),
        "(codes searched for, those redone in float64) on the CPU since the last reset.");
  m.def("set_rvq_search_bound_factor", &dcx::set_rvq_search_bound_factor,
        "For tests: multiplies the error bound below which rvq_search redoes a code in float64.");
  m.def("set_rvq_search_slack_factor", &dcx::set_rvq_search_slack_factor,
        "For tests: multiplies the slack within which rvq_search's pass over bytes keeps groups of rows.");
  m.def("set_gemm", &set_gemm, "Switches the small GEMM to own or brgemm (torch's); False when that is not built in.");
  dcx::bind_program(m);
  dcx::bind_replay(m);
  dcx::bind_snapshot(m);
}
