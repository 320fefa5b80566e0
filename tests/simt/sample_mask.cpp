// Masks as values or packed bits, and their backward.
#include "mask_call.h"

#include "cuda/sample_mask.cuh"

using namespace modmask::cuda;

namespace {

SampleParams sample_params(const Call& call) {
  const MaskParams mask = mask_params(call);
  const int64_t count = call.integer("count"), bytes = (count + 7) / 8;
  return {
      mask,
      call.pointer<const float>("logits"),
      count,
      // [samples, sets, bytes], unless told otherwise
      {call.pointer<uint8_t>("bits"), call.integer("set_stride", bytes),
       call.integer("sample_stride", mask.sets * bytes)},
      call.pointer<float>("values"),
      call.pointer<const float>("dvalues"),
      call.pointer<float>("dlogits")};
}

}  // namespace

KERNEL(sample_bits) {
  const SampleParams p = sample_params(call);
  with_mode(p.mask, [&](auto mode) {
    call.launch(sample_shape(p), [&] { sample_bits<decltype(mode)::value>(p); });
  });
}

KERNEL(sample_values) {
  const SampleParams p = sample_params(call);
  const bool hard = call.integer("hard") != 0;
  with_mode(p.mask, [&](auto mode) {
    constexpr MaskMode kMode = decltype(mode)::value;
    call.launch(sample_shape(p), [&] {
      hard ? sample_values<kMode, true>(p) : sample_values<kMode, false>(p);
    });
  });
}

KERNEL(sample_backward) {
  const SampleParams p = sample_params(call);
  with_mode(p.mask, [&](auto mode) {
    call.launch(sample_shape(p), [&] { sample_backward<decltype(mode)::value>(p); });
  });
}

// The surrogate alone: logits, noise words k and 1 / tau to values and slopes.
KERNEL(surrogate) {
  const auto* logits = call.pointer<const float>("logits");
  const auto* words = call.pointer<const uint32_t>("words");
  auto* values = call.pointer<float>("values");
  auto* slopes = call.pointer<float>("slopes");
  const auto tau = static_cast<float>(call.number("tau", 1.0));
  for (int64_t i = 0; i < call.size("logits"); ++i) {
    const float u = modmask::noise_value(words[i] << 9), rest = modmask::kTwo24 - u;
    const modmask::Surrogate s = tau == 1.0f
                                     ? modmask::surrogate(u * modmask::exp_minus(logits[i]), rest)
                                     : modmask::surrogate(logits[i], u, rest, 1.0f / tau);
    values[i] = s.value;
    slopes[i] = s.slope;
  }
}
