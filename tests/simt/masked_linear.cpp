// Masked products of few rows, forward and backward, and products with selected masks.
#include "mask_call.h"

#include "cuda/masked_linear.cuh"

using namespace modmask::cuda;

namespace {

MaskedLinear layer(const Call& call) {
  MaskedLinear l{};
  call.with_dtype("dtype", [&](auto t) {
    using T = decltype(t);
    l.type = std::is_same<T, float>::value    ? ElementType::kFloat32
             : std::is_same<T, __half>::value ? ElementType::kFloat16
                                              : ElementType::kBFloat16;
    l.weight = call.pointer<const T>("weight");
    l.bias = call.pointer<const T>("bias");
  });
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
  void* found = nullptr;
  call.with_dtype("dtype", [&](auto t) { found = call.pointer<decltype(t)>(name); });
  return found;
}

template <MaskMode kMode, bool kSoft, int kRows>
void product(const Call& call, const LinearParams& p) {
  call.launch(p.plan.shape, [&] {
    p.plan.backward ? masked_linear_dx<kMode, kSoft, kRows>(p)
                    : masked_linear_forward<kMode, kSoft, kRows>(p);
  });
}

template <MaskMode kMode>
void hard_product(const Call& call, const LinearParams& p) {
  switch (p.plan.job_rows) {
    case 1:
      return product<kMode, false, 1>(call, p);
    case 4:
      return product<kMode, false, 4>(call, p);
    default:
      return product<kMode, false, 8>(call, p);
  }
}

// A product from its plan to its end, by the kernels that the launchers choose.
void whole_product(const Call& call, bool backward) {
  const MaskedLinear l = layer(call);
  LinearParams p = linear_params(l, backward, typed(call, backward ? "dy" : "x"), nullptr);
  const FinishParams sized = finish_params(p, nullptr);
  std::vector<float> partials(sized.splits * l.batch() * sized.columns, NAN);
  call.device.buffer("partials", partials.data(), partials.size() * 4, 4);
  p.partials = partials.data();
  if (l.packed.bits != nullptr) {
    hard_product<MaskMode::kPacked>(call, p);
  } else if (!l.hard) {
    product<MaskMode::kGeneral, true, 8>(call, p);
  } else if (mode_of(l.mask) == MaskMode::kPlain) {
    hard_product<MaskMode::kPlain>(call, p);
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
