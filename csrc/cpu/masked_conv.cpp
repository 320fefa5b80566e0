// modmask::masked_conv and its backward on the CPU. Schemas live in Python.

#include <tuple>
#include <vector>

#include "conv_geometry.h"

namespace modmask {

namespace {

// Everything that both directions need, with the contiguous copies it points into.
struct ConvArguments {
  Contiguous x, weight, logits, bias, bias_logits, seed;
  CutStore cuts;
  int64_t sets;
  Layout layout;
  ConvProblem problem;

  ConvArguments(
      const Tensor& x_,
      const Tensor& weight_,
      const Tensor& logits_,
      const std::optional<Tensor>& bias_,
      const std::optional<Tensor>& bias_logits_,
      const std::optional<Tensor>& seed_,
      const std::vector<int64_t>& stride,
      const std::vector<int64_t>& padding,
      const std::vector<int64_t>& dilation,
      int64_t groups,
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
    problem = conv_geometry(x_, weight_, stride, padding, dilation, groups);
    const int64_t outputs = problem.outputs;
    if (bias_.has_value()) {
      check_same_type(*bias_, x_, "bias");
      STD_TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == outputs, "bias must be [out]");
    }
    if (bias_logits_.has_value()) {
      check_float32(*bias_logits_, "bias_logits");
      STD_TORCH_CHECK(
          bias_.has_value() && bias_logits_->numel() == sets * outputs,
          "bias_logits must be [out] or [sets, out] and come with a bias");
    }
    problem.mask = mask_spec(
        seed_, seed, sets, samples, tensor_id, sample_offset, element_offset, tau, hard, estimator);
    problem.mask.shared = are_shared(logits_, weight_.dim() + 1);
    problem.mask.tensor_id = cuts.add(
        problem.mask, estimator, tensor_id, logits.floats(), logits_.numel() / sets,
        problem.mask.shared);
    problem.bias_tensor_id =
        cuts.add(problem.mask, estimator, bias_tensor_id, bias_logits.floats(), outputs);
    problem.mask.layout = layout.layout;
    const int64_t parts = sets * problem.mask.samples;
    STD_TORCH_CHECK(
        parts > 0 && x_.size(0) % parts == 0,
        "the batch of x does not divide into sets * samples groups");
    problem.images = x_.size(0) / parts;
    problem.x = x.data();
    problem.weight = weight.data();
    problem.logits = logits.floats();
    problem.bias = bias.data();
    problem.bias_logits = bias_logits.floats();
  }

  bool empty() const {
    return problem.images == 0 || problem.outputs == 0;
  }
};

Tensor masked_conv(
    Tensor x,
    Tensor weight,
    Tensor logits,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_logits,
    std::optional<Tensor> seed,
    std::vector<int64_t> stride,
    std::vector<int64_t> padding,
    std::vector<int64_t> dilation,
    int64_t groups,
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
  const ConvArguments a(
      x, weight, logits, bias, bias_logits, seed, stride, padding, dilation, groups, tensor_id,
      bias_tensor_id, sample_offset, element_offset, samples, tau, hard,
      {estimator, low, high, clamp, antithetic}, n_of_m);
  Tensor y = empty_like(x, conv_sizes(x, a.problem));
  if (!a.empty()) {
    active_kernels().conv_forward(a.problem, y.mutable_data_ptr(), torch_runner());
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_conv_backward(
    Tensor dy,
    Tensor x,
    Tensor weight,
    Tensor logits,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_logits,
    std::optional<Tensor> seed,
    std::vector<int64_t> stride,
    std::vector<int64_t> padding,
    std::vector<int64_t> dilation,
    int64_t groups,
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
  const ConvArguments a(
      x, weight, logits, bias, bias_logits, seed, stride, padding, dilation, groups, tensor_id,
      bias_tensor_id, sample_offset, element_offset, samples, tau, hard,
      {estimator, low, high, clamp, antithetic}, n_of_m);
  check_same_type(dy, x, "dy");
  const Contiguous dy_data(dy);
  GradientTensors g(
      x, weight, logits, bias, bias_logits, need_x, need_weight, need_logits, need_bias,
      need_bias_logits);
  if (a.empty()) {
    g.zero();
  } else {
    active_kernels().conv_backward(a.problem, g.pointers(dy_data.data()), torch_runner());
  }
  return g.tensors();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  m.impl("masked_conv", TORCH_BOX(&masked_conv));
  m.impl("masked_conv_backward", TORCH_BOX(&masked_conv_backward));
}

}  // namespace modmask
