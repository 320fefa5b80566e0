// The sizes of a convolution, from its operands and options.
#pragma once

#include <tuple>
#include <vector>

#include "bindings.h"

namespace modmask {

// The options of a convolution, as the schemas say them.
struct Window {
  using Members =
      std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int64_t>;

  std::vector<int64_t> stride;
  std::vector<int64_t> padding;  // before and after, of each dimension
  std::vector<int64_t> dilation;
  int64_t groups;
};

// Everything but the pointers and what belongs to masks; all images are in one group.
inline ConvProblem conv_geometry(const Tensor& x, const Tensor& weight, const Window& window) {
  const auto& [stride, padding, dilation, groups] = window;
  STD_TORCH_CHECK(
      weight.dim() == 4 && x.dim() == 4, "x and weight must have two spatial dimensions");
  STD_TORCH_CHECK(
      groups > 0 && x.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0,
      "the channels of x and weight must fit the groups of the convolution");
  STD_TORCH_CHECK(
      stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
      "stride and dilation must be two numbers, padding four");
  ConvProblem p{};
  p.dtype = element_type(x);
  p.images = x.size(0);
  p.conv_groups = groups;
  p.channels = x.size(1);
  p.outputs = weight.size(0);
  for (int i = 0; i < 2; ++i) {
    p.size[i] = x.size(2 + i);
    p.kernel[i] = weight.size(2 + i);
    p.stride[i] = stride[i];
    p.dilation[i] = dilation[i];
    p.padding[i] = padding[2 * i];
    STD_TORCH_CHECK(
        p.kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[2 * i] >= 0 &&
            padding[2 * i + 1] >= 0,
        "kernel, stride and dilation must be positive, padding not negative");
    const int64_t room =
        p.size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (p.kernel[i] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "the kernel is larger than the padded input");
    p.out_size[i] = room / stride[i] + 1;
  }
  return p;
}

// The shape of the result.
inline std::vector<int64_t> conv_sizes(const Tensor& x, const ConvProblem& p) {
  return {x.size(0), p.outputs, p.out_size[0], p.out_size[1]};
}

}  // namespace modmask
