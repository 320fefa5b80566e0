// modmask::select_linear_cuda. The schema lives in Python.

#include <optional>
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  m.impl("select_linear_cuda", TORCH_BOX(&select_linear));
}

}  // namespace modmask::cuda
