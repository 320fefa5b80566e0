// modmask::masked_linear and its backward on the CPU. Schemas live in Python.

#include <tuple>
#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

struct LinearArguments : ProductArguments {
  LinearProblem problem;

  LinearArguments(const Operands& o, const Draw& draw, const std::vector<int64_t>& n_of_m)
      : ProductArguments(o, draw, n_of_m) {
    STD_TORCH_CHECK(o.weight.dim() == 2, "weight must be [out, in]");
    problem.out = o.weight.size(0);
    problem.in = o.weight.size(1);
    STD_TORCH_CHECK(o.x.dim() >= 2 && o.x.size(-1) == problem.in, "x must be [batch, ..., in]");
    problem.dtype = element_type(o.x);
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < o.x.dim(); ++d) {
      rows *= o.x.size(d);
    }
    problem.rows = rows / complete(problem, o, draw, problem.out);
  }
};

Tensor masked_linear(const Operands& o, const Draw& draw, const std::vector<int64_t>& n_of_m) {
  const LinearArguments a(o, draw, n_of_m);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < o.x.dim(); ++d) {
    shape.push_back(o.x.size(d));
  }
  shape.push_back(a.problem.out);
  Tensor y = empty_like(o.x, shape);
  if (y.numel() > 0) {
    active_kernels().linear_forward(a.problem, y.mutable_data_ptr(), torch_runner());
  }
  return y;
}

// An empty tensor stands for a gradient that was not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_linear_backward(
    const Tensor& dy,
    const Operands& o,
    const Draw& draw,
    const std::vector<int64_t>& n_of_m,
    const Needs& needs) {
  const LinearArguments a(o, draw, n_of_m);
  check_same_type(dy, o.x, "dy");
  const Contiguous dy_data(dy);
  GradientTensors g(o, needs);
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
  MODMASK_IMPL(m, "masked_linear", masked_linear);
  MODMASK_IMPL(m, "masked_linear_backward", masked_linear_backward);
}

}  // namespace modmask
