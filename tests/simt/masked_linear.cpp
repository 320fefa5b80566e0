// Masked products of few rows, forward and backward, and products with selected masks.
#include "mask_call.h"

#include "cuda/masked_linear.cuh"

using namespace modmask::cuda;

namespace {

// f(integral_constant<MaskMode>, bool_constant<soft>, integral_constant<rows>) of a product. Not
// all masks are compiled for 16-bit storage, which has nothing to do with them.
template <typename T, typename F>
void with_product(const MaskParams& mask, bool packed, bool soft, int rows, const F& f) {
  const auto of_rows = [&](auto mode, auto is_soft) {
    switch (rows) {
      case 1:
        return f(mode, is_soft, std::integral_constant<int, 1>{});
      case 4:
        return f(mode, is_soft, std::integral_constant<int, 4>{});
      default:
        return f(mode, is_soft, std::integral_constant<int, 8>{});
    }
  };
  if (packed) {
    of_rows(std::integral_constant<MaskMode, MaskMode::kPacked>{}, std::false_type{});
  } else if (!soft && mode_of(mask) == MaskMode::kPlain) {
    of_rows(std::integral_constant<MaskMode, MaskMode::kPlain>{}, std::false_type{});
  } else if constexpr (!std::is_same<T, float>::value) {
    throw std::invalid_argument("dtype: these masks are compiled for float32");
  } else if (soft) {
    of_rows(std::integral_constant<MaskMode, MaskMode::kGeneral>{}, std::true_type{});
  } else {
    with_mode(mask, [&](auto mode) { of_rows(mode, std::false_type{}); });
  }
}

MaskParams bias_mask(const Call& call) {
  MaskParams p = mask_params(call);
  p.tensor_id = call.integer("bias_tensor_id", 0);
  p.element_offset = 0;
  p.among = 0;
  p.cuts = call.pointer<const modmask::Cut>("bias_cuts");
  return p;
}

// Runs a product from its plan to its end.
template <typename T>
void product(const Call& call, bool backward) {
  LinearParams<T> p{};
  p.mask = mask_params(call);
  p.rows = call.integer("rows");
  p.in = call.integer("in");
  p.out = call.integer("out");
  p.from = call.pointer<const T>(backward ? "dy" : "x");
  p.weight = call.pointer<const T>("weight");
  p.logits = call.pointer<const float>("logits");
  p.bits = call.pointer<const uint8_t>("bits");
  p.row_sets = call.pointer<const int64_t>("row_sets");
  const bool soft = call.integer("hard", 1) == 0;
  p.plan = plan_linear(p.in, p.out, p.rows, p.mask.samples, p.mask.sets, soft, backward);

  FinishParams<T> finish{};
  finish.splits = p.plan.splits;
  finish.batch = p.mask.sets * p.mask.samples * p.rows;
  finish.columns = backward ? p.in : p.out;
  finish.to = call.pointer<T>(backward ? "dx" : "y");
  finish.rows = p.rows;
  finish.row_sets = p.row_sets;
  if (!backward) {
    finish.bias = call.pointer<const T>("bias");
    finish.mask = bias_mask(call);
    finish.bias_logits = call.pointer<const float>("bias_logits");
    finish.bias_bits = call.pointer<const uint8_t>("bias_bits");
  }
  std::vector<float> partials(finish.splits * finish.batch * finish.columns, NAN);
  call.device.buffer("partials", partials.data(), partials.size() * 4, 4);
  p.partials = partials.data();
  finish.partials = partials.data();
  with_product<T>(
      p.mask, p.bits != nullptr, soft, p.plan.job_rows, [&](auto mode, auto is_soft, auto rows) {
        constexpr MaskMode kMode = decltype(mode)::value;
        constexpr bool kSoft = decltype(is_soft)::value;
        constexpr int kRows = decltype(rows)::value;
        call.launch(p.plan.shape, [&] {
          backward ? masked_linear_dx<T, kMode, kSoft, kRows>(p)
                   : masked_linear_forward<T, kMode, kSoft, kRows>(p);
        });
      });
  call.launch(finish_shape(finish), [&] {
    soft ? finish_linear<T, false>(finish) : finish_linear<T, true>(finish);
  });
}

}  // namespace

KERNEL(masked_linear) {
  call.with_dtype("dtype", [&](auto t) { product<decltype(t)>(call, false); });
}

KERNEL(masked_linear_dx) {
  call.with_dtype("dtype", [&](auto t) { product<decltype(t)>(call, true); });
}

KERNEL(masked_linear_dlogits) {
  call.with_dtype("dtype", [&](auto t) {
    using T = decltype(t);
    LogitGradientParams<T> p{
        mask_params(call),
        call.integer("rows"),
        call.integer("in"),
        call.integer("out"),
        call.pointer<const T>("x"),
        call.pointer<const T>("dy"),
        call.pointer<const T>("weight"),
        call.pointer<const float>("logits"),
        call.pointer<float>("dlogits")};
    const bool plain = mode_of(p.mask) == MaskMode::kPlain;
    call.launch(logit_gradient_shape(p), [&] {
      plain ? masked_linear_dlogits<T, MaskMode::kPlain>(p)
            : masked_linear_dlogits<T, MaskMode::kGeneral>(p);
    });
  });
}

KERNEL(bias_gradients) {
  call.with_dtype("dtype", [&](auto t) {
    using T = decltype(t);
    const BiasGradientParams<T> p{
        bias_mask(call),
        call.integer("rows"),
        call.integer("out"),
        call.pointer<const T>("dy"),
        call.pointer<const T>("bias"),
        call.pointer<const float>("bias_logits"),
        call.pointer<T>("dbias"),
        call.pointer<float>("dbias_logits")};
    const bool hard = call.integer("hard", 1) != 0;
    call.launch(bias_gradient_shape(p), [&] {
      hard ? bias_gradients<T, true>(p) : bias_gradients<T, false>(p);
    });
  });
}
