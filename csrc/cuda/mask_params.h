// What kernels are told of masks. Neither torch nor CUDA: the bindings fill it.
#pragma once

#include <cstdint>

#include "../common/estimator.h"
#include "../common/philox.h"

namespace modmask::cuda {

// How the masks of one parameter are drawn, as MaskSpec of csrc/cpu/kernels.h; pointers are the
// device's. Group g = set * samples + sample.
struct MaskParams {
  const int64_t* seeds;  // [sets, draws], or one with seed_stride 0, or null: no noise
  int64_t seed_stride;
  int64_t sets;
  int64_t samples;  // of all draws of a set
  int64_t sample_offset;
  int64_t element_offset;
  int64_t tensor_id;
  float tau;
  Estimator estimator;
  float low;  // kHardConcrete: the stretch; kThreshold: the cut, and whether ties are kept
  float high;
  float least_u;  // kHardConcrete: bounds of the uniform number
  float most_u;
  bool antithetic;      // samples 2j and 2j + 1 share the noise of sample j, the second as 1 - u
  const Cut* cuts;      // kTopK: [sets]
  int64_t keep, among;  // the n largest of every m weights are kept; m = 0: each by itself
  int64_t stride;       // how far apart these lie
  int64_t draws = 1;    // seeds of each set, which share its samples equally
  bool shared = false;  // all sets have the logits of the first one
};

// One bit for every weight, of sets and samples that lie so many bytes apart.
struct MaskBits {
  uint8_t* bits;
  int64_t set_stride;
  int64_t sample_stride;
};

// What kernels are compiled for; host code asks for it.
enum class MaskMode {
  kPlain,    // gumbel_sigmoid with noise
  kGeneral,  // anything else that decides each weight by itself
  kGroups,   // n of m
  kPacked,   // bits that sample_bits wrote, where a kernel takes them
};

MODMASK_HOST_DEVICE bool has_noise(const MaskParams& p) {
  return p.seeds != nullptr &&
         (p.estimator == Estimator::kGumbelSigmoid || p.estimator == Estimator::kHardConcrete);
}

inline MaskMode mode_of(const MaskParams& p) {
  if (p.among > 0) {
    return MaskMode::kGroups;
  }
  return has_noise(p) && p.estimator == Estimator::kGumbelSigmoid ? MaskMode::kPlain
                                                                  : MaskMode::kGeneral;
}

}  // namespace modmask::cuda
