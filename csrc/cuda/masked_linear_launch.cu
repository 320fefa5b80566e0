#include "launch.cuh"
#include "masked_linear.cuh"

namespace modmask::cuda {

namespace {

template <MaskMode kMode, bool kSoft, int kRows>
void launch_product(const LinearParams& p, Stream stream) {
  p.plan.backward
      ? launch("masked_linear_dx", masked_linear_dx<kMode, kSoft, kRows>, p.plan.shape, p, stream)
      : launch(
            "masked_linear_forward", masked_linear_forward<kMode, kSoft, kRows>, p.plan.shape, p,
            stream);
}

template <MaskMode kMode>
void launch_hard_product(const LinearParams& p, Stream stream) {
  switch (p.plan.job_rows) {
    case 1:
      return launch_product<kMode, false, 1>(p, stream);
    case 4:
      return launch_product<kMode, false, 4>(p, stream);
    default:
      return launch_product<kMode, false, 8>(p, stream);
  }
}

void launch_parts(const LinearParams& p, Stream stream) {
  if (p.layer.packed.bits != nullptr) {
    launch_hard_product<MaskMode::kPacked>(p, stream);
  } else if (p.layer.hard) {
    launch_hard_product<MaskMode::kPlain>(p, stream);
  } else {
    launch_product<MaskMode::kGeneral, true, 8>(p, stream);
  }
}

void launch_whole_product(const LinearParams& p, void* to, Stream stream) {
  launch_parts(p, stream);
  const FinishParams finish = finish_params(p, to);
  launch("finish_linear", finish_linear, finish_shape(finish), finish, stream);
}

}  // namespace

int64_t masked_linear_partials(const MaskedLinear& l, bool backward) {
  const LinearParams p = linear_params(l, backward, nullptr, nullptr);
  return p.plan.splits * l.batch() * (backward ? l.in : l.out);
}

int64_t launch_masked_linear_parts(
    const MaskedLinear& l, bool backward, const void* from, float* partials, Stream stream) {
  const LinearParams p = linear_params(l, backward, from, partials);
  launch_parts(p, stream);
  return p.plan.splits;
}

void launch_masked_linear(
    const MaskedLinear& l, const void* x, float* partials, void* y, Stream stream) {
  launch_whole_product(linear_params(l, false, x, partials), y, stream);
}

void launch_masked_linear_dx(
    const MaskedLinear& l, const void* dy, float* partials, void* dx, Stream stream) {
  launch_whole_product(linear_params(l, true, dy, partials), dx, stream);
}

void launch_masked_linear_gradients(
    const MaskedLinear& l,
    const void* x,
    const void* dy,
    float* dlogits,
    void* dweight,
    Stream stream) {
  const LinearGradientParams p{l, x, dy, dlogits, dweight};
  const bool plain = mode_of(l.mask) == MaskMode::kPlain;
  const auto kernel = dweight == nullptr
                          ? (plain ? masked_linear_gradients<MaskMode::kPlain, false>
                                   : masked_linear_gradients<MaskMode::kGeneral, false>)
                          : (plain ? masked_linear_gradients<MaskMode::kPlain, true>
                                   : masked_linear_gradients<MaskMode::kGeneral, true>);
  launch("masked_linear_gradients", kernel, linear_gradient_shape(p), p, stream);
}

void launch_bias_gradients(
    const MaskedLinear& l, const float* sums, void* dbias, float* dbias_logits, Stream stream) {
  const BiasGradientParams p{l, sums, dbias, dbias_logits};
  launch("bias_gradients", bias_gradients, bias_gradient_shape(p), p, stream);
}

}  // namespace modmask::cuda
