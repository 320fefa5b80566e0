// The masks of a call, as tests/simt/mask_arguments.py passes them.
#pragma once

#include "call.h"

#include "cuda/mask.cuh"

inline modmask::cuda::MaskParams mask_params(const Call& call) {
  modmask::cuda::MaskParams p{};
  p.seeds = call.pointer<const int64_t>("seeds");
  p.seed_stride = call.integer("seed_stride");
  p.sets = call.integer("sets");
  p.samples = call.integer("samples");
  p.sample_offset = call.integer("sample_offset");
  p.element_offset = call.integer("element_offset");
  p.tensor_id = call.integer("tensor_id");
  p.tau = static_cast<float>(call.number("tau", 1.0));
  p.estimator = static_cast<modmask::Estimator>(call.integer("estimator"));
  p.low = static_cast<float>(call.number("low", 0.0));
  p.high = static_cast<float>(call.number("high", 0.0));
  p.least_u = static_cast<float>(call.number("clamp", 0.0));
  p.most_u = static_cast<float>(1.0 - call.number("clamp", 0.0));
  p.antithetic = call.integer("antithetic") != 0;
  p.cuts = call.pointer<const modmask::Cut>("cuts");
  p.keep = call.integer("keep", 0);
  p.among = call.integer("among", 0);
  p.stride = call.integer("stride", 1);
  p.draws = call.integer("draws");
  p.shared = call.integer("shared", 0) != 0;
  return p;
}

// Calls f(integral_constant<MaskMode>) with the mode of these masks.
template <typename F>
void with_mode(const modmask::cuda::MaskParams& p, const F& f) {
  using modmask::cuda::MaskMode;
  switch (mode_of(p)) {
    case MaskMode::kPlain:
      return f(std::integral_constant<MaskMode, MaskMode::kPlain>{});
    case MaskMode::kGeneral:
      return f(std::integral_constant<MaskMode, MaskMode::kGeneral>{});
    default:
      return f(std::integral_constant<MaskMode, MaskMode::kGroups>{});
  }
}
