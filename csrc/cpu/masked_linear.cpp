// modmask::masked_linear and its backward on the CPU. Schemas live in Python.

#include <tuple>
#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

// Everything that both directions need, with the contiguous copies it points into.
struct Arguments {
  Contiguous x, weight, logits, bias, bias_logits, seed;
  CutStore cuts;
  int64_t sets;
  Layout layout;
  LinearProblem problem;

  Arguments(
      const Tensor& x_,
      const Tensor& weight_,
      const Tensor& logits_,
      const std::optional<Tensor>& bias_,
      const std::optional<Tensor>& bias_logits_,
      const std::optional<Tensor>& seed_,
      int64_t tensor_id,
      int64_t bias_tensor_id,
      int64_t sample_offset,
      int64_t element_offset,
      int64_t samples,
      double tau,
      bool hard,
      const EstimatorArguments& estimator,
      const std::vector<int64_t>& n_of_m)
      : x(x_),
        weight(weight_),
        logits(logits_, are_shared(logits_, weight_.dim() + 1)),
        bias(bias_),
        bias_logits(bias_logits_),
        seed(seed_),
        layout(weight_, logits_, n_of_m, estimator, sets) {
    check_float32(logits_, "logits");
    check_same_type(weight_, x_, "weight");
    STD_TORCH_CHECK(weight_.dim() == 2, "weight must be [out, in]");
    const int64_t out = weight_.size(0), in = weight_.size(1);
    STD_TORCH_CHECK(x_.dim() >= 2 && x_.size(-1) == in, "x must be [batch, ..., in]");
    if (bias_.has_value()) {
      check_same_type(*bias_, x_, "bias");
      STD_TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == out, "bias must be [out]");
    }
    if (bias_logits_.has_value()) {
      check_float32(*bias_logits_, "bias_logits");
      STD_TORCH_CHECK(
          bias_.has_value() && bias_logits_->dim() >= 1 && bias_logits_->dim() <= 2 &&
              bias_logits_->size(-1) == out && bias_logits_->numel() == sets * out,
          "bias_logits must be [out] or [sets, out] and come with a bias");
    }
    problem.mask = mask_spec(
        seed_, seed, sets, samples, tensor_id, sample_offset, element_offset, tau, hard, estimator);
    problem.mask.shared = are_shared(logits_, weight_.dim() + 1);
    problem.mask.tensor_id = cuts.add(
        problem.mask, estimator, tensor_id, logits.floats(), logits_.numel() / sets,
        problem.mask.shared);
    problem.bias_tensor_id =
        cuts.add(problem.mask, estimator, bias_tensor_id, bias_logits.floats(), out);
    problem.mask.layout = layout.layout;
    int64_t all_rows = 1;
    for (int64_t d = 0; d + 1 < x_.dim(); ++d) {
      all_rows *= x_.size(d);
    }
    const int64_t groups = sets * problem.mask.samples;
    STD_TORCH_CHECK(
        groups > 0 && x_.size(0) % groups == 0,
        "the batch of x does not divide into sets * samples groups");
    problem.dtype = element_type(x_);
    problem.rows = all_rows / groups;
    problem.in = in;
    problem.out = out;
    problem.x = x.data();
    problem.weight = weight.data();
    problem.logits = logits.floats();
    problem.bias = bias.data();
    problem.bias_logits = bias_logits.floats();
  }
};

Tensor masked_linear(
    Tensor x,
    Tensor weight,
    Tensor logits,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_logits,
    std::optional<Tensor> seed,
    int64_t tensor_id,
    int64_t bias_tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    int64_t samples,
    double tau,
    bool hard,
    int64_t estimator,
    double low,
    double high,
    double clamp,
    bool antithetic,
    std::vector<int64_t> n_of_m) {
  const Arguments a(
      x, weight, logits, bias, bias_logits, seed, tensor_id, bias_tensor_id, sample_offset,
      element_offset, samples, tau, hard, {estimator, low, high, clamp, antithetic}, n_of_m);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
  }
  shape.push_back(a.problem.out);
  Tensor y = empty_like(x, shape);
  if (y.numel() > 0) {
    active_kernels().linear_forward(a.problem, y.mutable_data_ptr(), torch_runner());
  }
  return y;
}

// An empty tensor stands for a gradient that was not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_linear_backward(
    Tensor dy,
    Tensor x,
    Tensor weight,
    Tensor logits,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_logits,
    std::optional<Tensor> seed,
    int64_t tensor_id,
    int64_t bias_tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    int64_t samples,
    double tau,
    bool hard,
    int64_t estimator,
    double low,
    double high,
    double clamp,
    bool antithetic,
    std::vector<int64_t> n_of_m,
    bool need_x,
    bool need_weight,
    bool need_logits,
    bool need_bias,
    bool need_bias_logits) {
  const Arguments a(
      x, weight, logits, bias, bias_logits, seed, tensor_id, bias_tensor_id, sample_offset,
      element_offset, samples, tau, hard, {estimator, low, high, clamp, antithetic}, n_of_m);
  check_same_type(dy, x, "dy");
  const Contiguous dy_data(dy);
  GradientTensors g(
      x, weight, logits, bias, bias_logits, need_x, need_weight, need_logits, need_bias,
      need_bias_logits);
  if (a.problem.rows == 0 || a.problem.out == 0) {
    g.zero();
  } else {
    if (a.problem.in == 0) {
      g.zero();
    }
    active_kernels().linear_backward(a.problem, g.pointers(dy_data.data()), torch_runner());
  }
  return g.tensors();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward));
}

}  // namespace modmask
