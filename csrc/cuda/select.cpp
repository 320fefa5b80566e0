// modmask::select_linear_cuda for few rows, and modmask::selected_product_cuda. The schemas live in
// Python.

#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"

namespace modmask::cuda {

namespace {

void check_bits(const Tensor& masks, int64_t count, const char* name) {
  const int64_t bytes = (count + 7) / 8;
  STD_TORCH_CHECK(
      masks.scalar_type() == ScalarType::Byte && masks.dim() == 2 && masks.size(1) == bytes, name,
      " must be uint8 [sets, ", bytes, "]");
}

// row_sets must be within the masks: a kernel does not look.
Tensor select_linear(
    Tensor x,
    Tensor weight,
    Tensor masks,
    Tensor row_sets,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_masks) {
  const Place place(x);
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [out, in]");
  // every row is a sample of one set
  MaskedLinear l{};
  l.type = element_type(x, "x");
  l.mask.sets = 1;
  l.mask.samples = x.size(0);
  l.hard = true;
  l.rows = 1;
  l.out = weight.size(0);
  l.in = weight.size(1);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == l.in, "x must be [batch, in]");
  check_same_type(weight, x, "weight");
  check_bits(masks, weight.numel(), "masks");
  STD_TORCH_CHECK(
      row_sets.scalar_type() == ScalarType::Long && row_sets.dim() == 1 &&
          row_sets.size(0) == x.size(0),
      "row_sets must be int64 [", x.size(0), "]");
  if (bias.has_value()) {
    check_same_type(*bias, x, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == l.out, "bias must be [out]");
  }
  if (bias_masks.has_value()) {
    check_bits(*bias_masks, l.out, "bias_masks");
    STD_TORCH_CHECK(
        bias.has_value() && bias_masks->size(0) == masks.size(0),
        "bias_masks must come with a bias and have as many sets as masks");
  }
  const Operand x_data(place, x, "x"), weight_data(place, weight, "weight");
  const Operand bits(place, masks, "masks"), rows(place, row_sets, "row_sets");
  const Operand bias_data(place, bias, "bias"), bias_bits(place, bias_masks, "bias_masks");
  Tensor y = torch::stable::new_empty(x, {x.size(0), l.out});
  if (y.numel() > 0) {
    l.weight = weight_data.data<void>();
    l.packed = {const_cast<uint8_t*>(bits.data<uint8_t>()), masks.size(1), 0};
    l.row_sets = rows.data<int64_t>();
    l.bias = bias_data.data<void>();
    l.bias_bits = bias_bits.data<uint8_t>();
    Tensor partials =
        torch::stable::new_empty(x, {masked_linear_partials(l, false)}, ScalarType::Float);
    launch_masked_linear(
        l, x_data.data<void>(), results<float>(partials), results<void>(y), place.stream());
  }
  return y;
}

// Convolutions where weight has four dimensions, [out, in / groups, height, width], and x [batch,
// in, height, width]; else linear layers of x [batch, rows, in]. `order` sorts the examples by
// their sets; from first_example and first_tile on, both [sets + 1], come those of every set and
// their tiles of kSelectColumns places. Their values are not looked at here.
Tensor selected_product(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& masks,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bias_masks,
    const Tensor& order,
    const Tensor& first_example,
    const Tensor& first_tile,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation,
    int64_t groups) {
  const Place place(x);
  const bool convolution = weight.dim() == 4;
  Selected p{};
  p.type = element_type(x, "x");
  p.batch = x.size(0);
  p.sets = masks.size(0);
  p.out = weight.size(0);
  p.depth = p.out > 0 ? weight.numel() / p.out : 0;
  p.groups = groups;
  check_same_type(weight, x, "weight");
  check_bits(masks, weight.numel(), "masks");
  std::vector<int64_t> shape;
  if (convolution) {
    STD_TORCH_CHECK(
        x.dim() == 4 && stride.size() == 2 && padding.size() == 4 && dilation.size() == 2 &&
            groups > 0 && p.out % groups == 0 && x.size(1) == weight.size(1) * groups,
        "x must be [batch, in, height, width] and fit weight and options");
    constexpr int64_t kMost = int64_t{1} << 30;
    STD_TORCH_CHECK(
        x.size(1) < kMost && x.size(2) < kMost && x.size(3) < kMost && p.depth < kMost,
        "the dimensions of a convolution must be below 2^30");
    const auto places = [&](int64_t d) {
      const int64_t padded = x.size(2 + d) + padding[2 * d] + padding[2 * d + 1];
      return (padded - dilation[d] * (weight.size(2 + d) - 1) - 1) / stride[d] + 1;
    };
    shape = {p.batch, p.out, places(0), places(1)};
    p.places = shape[2] * shape[3];
    p.out_width = static_cast<int>(shape[3]);
    p.channels = static_cast<int>(x.size(1));
    p.height = static_cast<int>(x.size(2));
    p.width = static_cast<int>(x.size(3));
    p.kernel_height = static_cast<int>(weight.size(2));
    p.kernel_width = static_cast<int>(weight.size(3));
    p.stride_height = static_cast<int>(stride[0]);
    p.stride_width = static_cast<int>(stride[1]);
    p.padding_height = static_cast<int>(padding[0]);
    p.padding_width = static_cast<int>(padding[2]);
    p.dilation_height = static_cast<int>(dilation[0]);
    p.dilation_width = static_cast<int>(dilation[1]);
  } else {
    STD_TORCH_CHECK(
        weight.dim() == 2 && x.dim() == 3 && x.size(2) == weight.size(1) && groups == 1,
        "x must be [batch, rows, in] and weight [out, in]");
    shape = {p.batch, x.size(1), p.out};
    p.places = x.size(1);
  }
  for (const auto& [t, count] :
       {std::pair(order, p.batch), std::pair(first_example, p.sets + 1),
        std::pair(first_tile, p.sets + 1)}) {
    STD_TORCH_CHECK(
        t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == count,
        "order must be int64 [batch], first_example and first_tile [sets + 1]");
  }
  if (bias.has_value()) {
    check_same_type(*bias, x, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.out, "bias must be [out]");
  }
  if (bias_masks.has_value()) {
    check_bits(*bias_masks, p.out, "bias_masks");
    STD_TORCH_CHECK(
        bias.has_value() && bias_masks->size(0) == p.sets,
        "bias_masks must come with a bias and have as many sets as masks");
  }
  const Operand x_data(place, x, "x"), weight_data(place, weight, "weight");
  const Operand bits(place, masks, "masks"), bias_data(place, bias, "bias");
  const Operand bias_bits(place, bias_masks, "bias_masks"), order_data(place, order, "order");
  const Operand examples(place, first_example, "first_example");
  const Operand tiles(place, first_tile, "first_tile");
  Tensor y = empty_like(x, shape);
  if (y.numel() > 0) {
    // sets without an example have no tile, the others end with a part of one
    p.tiles = (p.batch * p.places + kSelectColumns - 1) / kSelectColumns +
              (p.sets < p.batch ? p.sets : p.batch);
    p.x = x_data.data<void>();
    p.weight = weight_data.data<void>();
    p.bits = bits.data<uint8_t>();
    p.bias = bias_data.data<void>();
    p.bias_bits = bias_bits.data<uint8_t>();
    p.order = order_data.data<int64_t>();
    p.first_example = examples.data<int64_t>();
    p.first_tile = tiles.data<int64_t>();
    p.y = results<void>(y);
    launch_selected_product(p, convolution, place.stream());
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  MODMASK_IMPL(m, "select_linear_cuda", select_linear);
  MODMASK_IMPL(m, "selected_product_cuda", selected_product);
}

}  // namespace modmask::cuda
