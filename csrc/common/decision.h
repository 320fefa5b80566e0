// The decision u < sigmoid(logit), written as u * exp(-logit) < 1 - u in float32 multiplications
// and additions that every backend rounds alike. Host and device; no torch.
//
// With r a noise word, U = (r >> 8) | 1 = 2k + 1 and u = U * 2^-24. Both sides are scaled by 2^24,
// which is exact: U * e < 2^24 - U.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace modmask {

constexpr float kMinusLog2E = -1.44269504f;
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
// |logit| is clamped at 100 * ln 2 = 69.3: the decision saturates at 16.7, and 2^24 * exp(69.3)
// squared stays far from overflow in the surrogate.
constexpr float kExponentLimit = 100.0f;
constexpr float kTwo24 = 16777216.0f;

// 2^f on [-1/2, 1/2], highest degree first; relative error 2e-9.
constexpr int kExp2Degree = 6;
#define MODMASK_EXP2 \
  {0.00015353362f, 0.0013398875f, 0.009618437f, 0.055503324f, 0.24022648f, 0.6931472f, 1.0f}
constexpr float kExp2[kExp2Degree + 1] = MODMASK_EXP2;

#if defined(__CUDA_ARCH__)
#define MODMASK_MUL(a, b) __fmul_rn((a), (b))
#define MODMASK_ADD(a, b) __fadd_rn((a), (b))
#else  // host code is compiled with -ffp-contract=off
#define MODMASK_MUL(a, b) ((a) * (b))
#define MODMASK_ADD(a, b) ((a) + (b))
#endif

// exp(-logit); a NaN logit gives the largest value, so that its weight is removed.
MODMASK_HOST_DEVICE float exp_minus(float logit) {
  float t = MODMASK_MUL(logit, kMinusLog2E);
  t = t < kExponentLimit ? t : kExponentLimit;
  t = t > -kExponentLimit ? t : -kExponentLimit;
  const float n = MODMASK_ADD(MODMASK_ADD(t, kRoundToInteger), -kRoundToInteger);
  const float f = MODMASK_ADD(t, -n);
  constexpr float c[kExp2Degree + 1] = MODMASK_EXP2;  // device code cannot index kExp2
  float p = c[0];
  for (int i = 1; i <= kExp2Degree; ++i) {
    p = MODMASK_ADD(MODMASK_MUL(p, f), c[i]);
  }
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return MODMASK_MUL(p, scale);
}

MODMASK_HOST_DEVICE float noise_value(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>((word >> 8) | 1u));
}

MODMASK_HOST_DEVICE bool keep(float exp_minus_logit, uint32_t word) {
  const float u = noise_value(word);
  return MODMASK_MUL(u, exp_minus_logit) < MODMASK_ADD(kTwo24, -u);
}

}  // namespace modmask
