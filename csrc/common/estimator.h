// What host and device know of estimators. No torch.
#pragma once

#include <cstdint>

namespace modmask {

// How a mask follows from logits and noise, numbered as in the schemas.
enum class Estimator { kGumbelSigmoid, kHardConcrete, kSigmoid, kThreshold, kTopK };

// Keeps logits above `value`, and those equal to it among the elements before `ties`.
struct Cut {
  float value;
  int64_t ties;
};

}  // namespace modmask
