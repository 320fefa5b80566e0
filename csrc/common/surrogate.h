// The soft mask s = sigmoid((logit + log((1-u)/u)) / tau) and its derivative with respect to the
// logit, in float32. Host and device; no torch. csrc/cpu/noise.h has the same on vectors.
#pragma once

#include <cmath>

#include "decision.h"

namespace modmask {

struct Surrogate {
  float value;
  float slope;
};

// A number as integer + fraction, which keeps the digits that one float32 would lose.
struct Split {
  float integer;
  float fraction;
};

MODMASK_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

MODMASK_HOST_DEVICE float clamped(float v, float least, float most) {
  v = v < most ? v : most;  // NaN gives `most`
  return v > least ? v : least;
}

// log2 of a positive, normal number; absolute error 1e-7.
MODMASK_HOST_DEVICE Split log2_positive(float x) {
  // mantissa in [sqrt(1/2), sqrt(2))
  uint32_t raw;
  memcpy(&raw, &x, sizeof raw);
  const int32_t bits = static_cast<int32_t>(raw) - 0x3F3504F3;
  const float m = bits_to_float((static_cast<uint32_t>(bits) & 0x007FFFFFu) + 0x3F3504F3u);
  const float t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  float p = 2.0f / 11.0f;
  p = fmaf(p, t2, 2.0f / 9.0f);
  p = fmaf(p, t2, 2.0f / 7.0f);
  p = fmaf(p, t2, 2.0f / 5.0f);
  p = fmaf(p, t2, 2.0f / 3.0f);
  p = fmaf(p, t2, 2.0f);
  return {static_cast<float>(bits >> 23), p * t * 1.44269504f};
}

// logit * log2(e); ln 2 in two parts makes the reduction exact.
MODMASK_HOST_DEVICE Split log2_of_exp(float logit) {
  const float l = clamped(logit, -80.0f, 80.0f);
  const float n =
      MODMASK_ADD(MODMASK_ADD(MODMASK_MUL(l, -kMinusLog2E), kRoundToInteger), -kRoundToInteger);
  const float rest = (l - n * 0.693359375f) - n * -2.12194440e-4f;
  return {n, rest * -kMinusLog2E};
}

// At tau = 1: with e = exp_minus(logit), `ue` is U e and `rest` 2^24 - U.
MODMASK_HOST_DEVICE Surrogate surrogate(float ue, float rest) {
  const float inverse = 1.0f / (ue + rest);
  const float value = rest * inverse;
  return {value, value * (ue * inverse)};
}

// At any temperature; `u` is U.
MODMASK_HOST_DEVICE Surrogate surrogate(float logit, float u, float rest, float inverse_tau) {
  const Split l = log2_of_exp(logit);
  const Split odds = log2_positive(u / rest);
  // log2 of (U e / rest)^(1/tau), again as integer and fraction; `whole` must be the rounded
  // product
  const float integer = odds.integer - l.integer;
  const float whole = MODMASK_MUL(integer, inverse_tau);
  const float lost = fmaf(integer, inverse_tau, -whole);
  const float part = fmaf(odds.fraction - l.fraction, inverse_tau, lost);
  const float bounded = clamped(MODMASK_ADD(whole, part), -kExponentLimit, kExponentLimit);
  const float n = MODMASK_ADD(MODMASK_ADD(bounded, kRoundToInteger), -kRoundToInteger);
  // beyond the limit, at low temperatures, the fraction is cut off
  const float f = clamped(MODMASK_ADD(whole, -n) + part, -1.0f, 1.0f);
  constexpr float c[kExp2Degree + 1] = MODMASK_EXP2;
  float p = c[0];
  for (int i = 1; i <= kExp2Degree; ++i) {
    p = fmaf(p, f, c[i]);
  }
  const float ratio = p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  const float inverse = 1.0f / (1.0f + ratio);
  return {inverse, inverse * (ratio * inverse) * inverse_tau};
}

}  // namespace modmask
