#include "launch.cuh"
#include "sample_mask.cuh"

namespace modmask::cuda {

void launch_sample_bits(
    const MaskParams& mask, const float* logits, int64_t count, const MaskBits& to, Stream stream) {
  const SampleParams p{mask, logits, count, to, nullptr, nullptr, nullptr};
  with_mode(mask, [&](auto mode) {
    launch("sample_bits", sample_bits<decltype(mode)::value>, sample_shape(p), p, stream);
  });
}

void launch_sample_values(
    const MaskParams& mask,
    const float* logits,
    int64_t count,
    bool hard,
    float* values,
    Stream stream) {
  const SampleParams p{mask, logits, count, {}, values, nullptr, nullptr};
  if (hard) {
    with_mode(mask, [&](auto mode) {
      launch(
          "sample_values", sample_values<decltype(mode)::value, true>, sample_shape(p), p, stream);
    });
  } else {  // n of m masks are hard
    const auto kernel = mode_of(mask) == MaskMode::kPlain
                            ? sample_values<MaskMode::kPlain, false>
                            : sample_values<MaskMode::kGeneral, false>;
    launch("sample_values", kernel, sample_shape(p), p, stream);
  }
}

void launch_sample_backward(
    const MaskParams& mask,
    const float* logits,
    int64_t count,
    const float* dvalues,
    float* dlogits,
    Stream stream) {
  const SampleParams p{mask, logits, count, {}, nullptr, dvalues, dlogits};
  // n of m has the slopes of masks that decide each weight by itself
  const auto kernel = mode_of(mask) == MaskMode::kPlain ? sample_backward<MaskMode::kPlain>
                                                        : sample_backward<MaskMode::kGeneral>;
  launch("sample_backward", kernel, sample_shape(p), p, stream);
}

}  // namespace modmask::cuda
