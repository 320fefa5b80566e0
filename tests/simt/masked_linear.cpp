// Masked products of few rows, forward and backward, and products with selected masks.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "linear_call.h"
#include "mask_call.h"

using namespace modmask::cuda;

namespace {

MaskedLinear layer(const Call& call) {
  MaskedLinear l{};
  l.type = call.element_type("dtype");
  l.weight = call.typed("dtype", "weight");
  l.bias = call.typed("dtype", "bias");
  l.mask = mask_params(call);
  l.mask.among = 0;  // n of m is packed
  l.hard = call.integer("hard", 1) != 0;
  l.rows = call.integer("rows");
  l.in = call.integer("in");
  l.out = call.integer("out");
  l.logits = call.pointer<const float>("logits");
  l.packed = {
      call.pointer<uint8_t>("bits"), call.integer("set_stride", (l.in * l.out + 7) / 8),
      call.integer("sample_stride", 0)};
  l.row_sets = call.pointer<const int64_t>("row_sets");
  l.bias_mask = l.mask;
  l.bias_mask.tensor_id = call.integer("bias_tensor_id", 0);
  l.bias_mask.element_offset = 0;
  l.bias_mask.cuts = call.pointer<const modmask::Cut>("bias_cuts");
  l.bias_logits = call.pointer<const float>("bias_logits");
  l.bias_bits = call.pointer<const uint8_t>("bias_bits");
  return l;
}

// An operand or result with the dtype of the layer.
void* typed(const Call& call, const std::string& name) {
  return call.typed("dtype", name);
}

// A product from its plan to its end, by the kernels that the launchers choose.
void whole_product(const Call& call, bool backward) {
  const MaskedLinear l = layer(call);
  LinearParams p = linear_params(l, backward, typed(call, backward ? "dy" : "x"), nullptr);
  const FinishParams sized = finish_params(p, nullptr);
  const size_t count = sized.splits * l.batch() * sized.columns;
  // of very many, pages exist that are touched
  const std::unique_ptr<void, decltype(&free)> partials(calloc(count, sizeof(float)), free);
  p.partials = static_cast<float*>(partials.get());
  if (count < 1 << 20) {
    std::fill_n(p.partials, count, NAN);
  }
  call.device.buffer("partials", p.partials, count * 4, 4);
  if (l.packed.bits != nullptr) {
    run_hard_product<MaskMode::kPacked>(call, p);
  } else if (!l.hard) {
    run_product<MaskMode::kGeneral, true, 8>(call, p);
  } else if (mode_of(l.mask) == MaskMode::kPlain) {
    run_hard_product<MaskMode::kPlain>(call, p);
  } else {
    throw std::invalid_argument("bits: these masks must be packed");
  }
  const FinishParams finish = finish_params(p, typed(call, backward ? "dx" : "y"));
  call.launch(finish_shape(finish), [&] { finish_linear(finish); });
}

template <MaskMode kMode>
void gradients(const Call& call, const LinearGradientParams& p) {
  call.launch(linear_gradient_shape(p), [&] {
    p.dweight == nullptr ? masked_linear_gradients<kMode, false>(p)
                         : masked_linear_gradients<kMode, true>(p);
  });
}

}  // namespace

KERNEL(masked_linear) {
  whole_product(call, false);
}

KERNEL(masked_linear_dx) {
  whole_product(call, true);
}

KERNEL(masked_linear_gradients) {
  const LinearGradientParams p{
      layer(call), typed(call, "x"), typed(call, "dy"), call.pointer<float>("dlogits"),
      typed(call, "dweight")};
  mode_of(p.layer.mask) == MaskMode::kPlain ? gradients<MaskMode::kPlain>(call, p)
                                            : gradients<MaskMode::kGeneral>(call, p);
}

KERNEL(bias_gradients) {
  const BiasGradientParams p{
      layer(call), call.pointer<const float>("sums"), typed(call, "dbias"),
      call.pointer<float>("dbias_logits")};
  call.launch(bias_gradient_shape(p), [&] { bias_gradients(p); });
}
