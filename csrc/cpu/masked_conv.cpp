// modmask::masked_conv and its backward on the CPU. Schemas live in Python.

#include <tuple>
#include <vector>

#include "conv_geometry.h"

namespace modmask {

namespace {

struct ConvArguments : ProductArguments {
  ConvProblem problem;

  ConvArguments(
      const Operands& o, const Window& window, const Draw& draw, const std::vector<int64_t>& n_of_m)
      : ProductArguments(o, draw, n_of_m), problem(conv_geometry(o.x, o.weight, window)) {
    const int64_t groups = complete(problem, o, draw, problem.outputs);
    problem.images = o.x.size(0) / groups;
  }

  bool empty() const {
    return problem.images == 0 || problem.outputs == 0;
  }
};

Tensor masked_conv(
    const Operands& o, const Window& window, const Draw& draw, const std::vector<int64_t>& n_of_m) {
  const ConvArguments a(o, window, draw, n_of_m);
  Tensor y = empty_like(o.x, conv_sizes(o.x, a.problem));
  if (!a.empty()) {
    active_kernels().conv_forward(a.problem, y.mutable_data_ptr(), torch_runner());
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_conv_backward(
    const Tensor& dy,
    const Operands& o,
    const Window& window,
    const Draw& draw,
    const std::vector<int64_t>& n_of_m,
    const Needs& needs) {
  const ConvArguments a(o, window, draw, n_of_m);
  check_same_type(dy, o.x, "dy");
  const Contiguous dy_data(dy);
  GradientTensors g(o, needs);
  if (a.empty()) {
    g.zero();
  } else {
    active_kernels().conv_backward(a.problem, g.pointers(dy_data.data()), torch_runner());
  }
  return g.tensors();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  MODMASK_IMPL(m, "masked_conv", masked_conv);
  MODMASK_IMPL(m, "masked_conv_backward", masked_conv_backward);
}

}  // namespace modmask
