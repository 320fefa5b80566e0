// What the kernels are given that scale and shift channels group by group; neither torch nor CUDA.
#pragma once

#include <cstdint>

#include "element.h"

namespace modmask::cuda {

// y = x * scale + shift, for x [groups, rows, channels, inner].
struct GroupAffine {
  ElementType type;  // of x, y and their gradients
  int64_t groups;
  int64_t rows;  // per group
  int64_t channels;
  int64_t inner;
  const float* scale;  // [groups, channels]
  const float* shift;  // likewise, or null

  int64_t count() const {
    return groups * rows * channels * inner;
  }
};

}  // namespace modmask::cuda
