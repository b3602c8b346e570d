// Bindings only. Tensors arrive as addresses (Tensor.data_ptr()), so the extension needs no torch to build and one
// build serves every torch; fdfast/cpu, the only caller, owns shapes and dtypes.
#include <pybind11/pybind11.h>

#include "fused_layers.hpp"
#include "gemm_bf16.hpp"
#include "policy_head.hpp"

namespace py = pybind11;
using namespace fdfast;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

HeadMath head_math(int divergence, double alpha, double temperature, double teacher_temperature, double softcap) {
  return {static_cast<Divergence>(divergence), alpha, 1.0 / temperature, 1.0 / teacher_temperature, softcap};
}

template <typename T>
void bind(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string(stem) + suffix; };
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def(
      name("head_stats_").c_str(),
      [](uintptr_t student, uintptr_t teacher, int64_t R, int64_t V, uintptr_t targets, const HeadMath& math,
         int threads, uintptr_t norm, uintptr_t teacher_norm, uintptr_t logprob, uintptr_t entropy,
         uintptr_t divergence, uintptr_t center, uintptr_t argmax) {
        head_stats(at<T>(student), at<T>(teacher), R, V, at<const int64_t>(targets), math, threads, at<RowNorm>(norm),
                   at<RowNorm>(teacher_norm), at<double>(logprob), at<double>(entropy), at<double>(divergence),
                   at<double>(center), at<int64_t>(argmax));
      },
      no_gil);
  m.def(
      name("head_divergence_").c_str(),
      [](uintptr_t student, uintptr_t teacher, int64_t R, int64_t V, const HeadMath& math, int threads, uintptr_t norm,
         uintptr_t teacher_norm, uintptr_t divergence, uintptr_t center) {
        head_divergence(at<const T>(student), at<const T>(teacher), R, V, math, threads, at<const RowNorm>(norm),
                        at<const RowNorm>(teacher_norm), at<double>(divergence), at<double>(center));
      },
      no_gil);
  m.def(
      name("row_norms_").c_str(),
      [](uintptr_t z, int64_t R, int64_t V, int threads, uintptr_t norm) {
        row_norms(at<const T>(z), R, V, threads, at<RowNorm>(norm));
      },
      no_gil);
  m.def(
      name("head_grads_").c_str(),
      [](uintptr_t student, uintptr_t teacher, int64_t R, int64_t V, int64_t first, bool tempered,
         bool narrow, const HeadMath& math, int threads, uintptr_t norm, uintptr_t teacher_norm, uintptr_t center,
         uintptr_t coef_p, uintptr_t coef_plogp, uintptr_t coef_divergence, uintptr_t targets,
         uintptr_t coef_target, uintptr_t topk_ids, uintptr_t topk_dz, int64_t K) {
        head_grads(at<T>(student), at<T>(teacher), R, V, first, tempered, narrow, math, threads,
                   at<const RowNorm>(norm), at<const RowNorm>(teacher_norm), at<const double>(center),
                   at<const double>(coef_p), at<const double>(coef_plogp), at<const double>(coef_divergence),
                   at<const int64_t>(targets), at<const double>(coef_target), at<const int64_t>(topk_ids),
                   at<const double>(topk_dz), K);
      },
      no_gil);
  m.def(
      name("narrow_rows_").c_str(),
      [](uintptr_t x, int64_t R, int64_t V, int threads) { narrow_rows(at<T>(x), R, V, threads); }, no_gil);
  m.def(
      name("row_thresholds_").c_str(),
      [](uintptr_t x, int64_t R, int64_t V, double share, int threads, uintptr_t threshold, uintptr_t total,
         uintptr_t needed) {
        row_thresholds(at<const T>(x), R, V, share, threads, at<double>(threshold), at<double>(total),
                       at<int64_t>(needed));
      },
      no_gil);
  m.def(
      name("sparse_grads_").c_str(),
      [](uintptr_t dlogits, int64_t R, int64_t V, uintptr_t threshold, uintptr_t weight, bool weight_bf16,
         uintptr_t hidden, bool hidden_bf16, int64_t D, int threads, uintptr_t dhidden, uintptr_t dweight,
         uintptr_t kept) {
        sparse_grads(at<const T>(dlogits), R, V, at<const double>(threshold), {at<const void>(weight), weight_bf16},
                     {at<const void>(hidden), hidden_bf16}, D, threads, at<T>(dhidden), at<T>(dweight),
                     at<double>(kept));
      },
      no_gil);
}

void bind_fused_layers(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t weight, int64_t R, int64_t D, double eps, int threads, uintptr_t y,
         uintptr_t inv_rms) {
        rms_norm(at<const float>(x), at<const float>(weight), R, D, eps, threads, at<float>(y), at<float>(inv_rms));
      },
      no_gil);
  m.def(
      "rms_norm_grads",
      [](uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t inv_rms, int64_t R, int64_t D, int threads,
         uintptr_t dx, uintptr_t dweight) {
        rms_norm_grads(at<const float>(dy), at<const float>(x), at<const float>(weight), at<const float>(inv_rms), R, D,
                       threads, at<float>(dx), at<float>(dweight));
      },
      no_gil);
  m.def(
      "swiglu",
      [](uintptr_t gate, uintptr_t up, int64_t n, int threads, uintptr_t y) {
        swiglu(at<const float>(gate), at<const float>(up), n, threads, at<float>(y));
      },
      no_gil);
  m.def(
      "swiglu_grads",
      [](uintptr_t dy, uintptr_t gate, uintptr_t up, int64_t n, int threads, uintptr_t dgate, uintptr_t dup) {
        swiglu_grads(at<const float>(dy), at<const float>(gate), at<const float>(up), n, threads, at<float>(dgate),
                     at<float>(dup));
      },
      no_gil);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The elementwise parts of policy_head and of layers on the CPU, and products of bfloat16: see csrc";
  py::class_<HeadMath>(m, "HeadMath")
      .def(py::init(&head_math), py::kw_only(), py::arg("divergence"), py::arg("alpha"), py::arg("temperature"),
           py::arg("teacher_temperature"), py::arg("softcap"));
  m.def("gemm_bf16_runs", &gemm_bf16_runs);
  m.def("gemm_bf16_scratch_bytes", &gemm_bf16_scratch_bytes);
  m.def(
      "gemm_bf16",
      [](uintptr_t a, int64_t a_lane, int64_t a_depth, uintptr_t b, int64_t b_lane, int64_t b_depth, int64_t M,
         int64_t N, int64_t K, uintptr_t c, uintptr_t upper, uintptr_t lower, int64_t stride, bool add, int threads) {
        gemm_bf16({at<const uint16_t>(a), a_lane, a_depth}, {at<const uint16_t>(b), b_lane, b_depth}, M, N, K,
                  {at<float>(c), at<uint16_t>(upper), at<uint16_t>(lower), stride}, add, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "round_halves",
      [](uintptr_t upper, uintptr_t lower, int64_t count, int threads) {
        round_halves(at<uint16_t>(upper), at<const uint16_t>(lower), count, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  bind_fused_layers(m);
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
