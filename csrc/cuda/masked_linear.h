// What the kernels of masked linear layers are given; neither torch nor CUDA.
#pragma once

#include <cstdint>

#include "element.h"
#include "mask_params.h"

namespace modmask::cuda {

// A layer of few rows per group: group g = set * samples + sample has rows [g * rows, (g + 1) *
// rows) of the batch.
struct MaskedLinear {
  ElementType type;  // of x, weight, bias and what is computed of them
  MaskParams mask;
  bool hard;
  int64_t rows;
  int64_t in;
  int64_t out;
  const void* weight;        // [out, in]
  const float* logits;       // [sets, out, in]
  MaskBits packed;           // instead of logits, for hard masks
  const int64_t* row_sets;   // the set of every row of the batch, with rows = 1 and packed masks
  const void* bias;          // [out] or null
  MaskParams bias_mask;      // its element_offset is 0
  const float* bias_logits;  // [sets, out] or null
  const uint8_t* bias_bits;  // [sets, ceil(out / 8)] with row_sets, or null

  MODMASK_HOST_DEVICE int64_t batch() const {
    return mask.sets * mask.samples * rows;
  }
};

}  // namespace modmask::cuda
