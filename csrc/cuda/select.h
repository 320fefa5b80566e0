// What the kernel of products with selected masks is given; neither torch nor CUDA.
#pragma once

#include <cstdint>

#include "element.h"

namespace modmask::cuda {

constexpr int kSelectColumns = 64;  // of a tile, which are of one set

// A convolution, or a linear layer, in which every example sees the weight under one of the masks.
// A column is one place of the result of one example; those of one set lie one after the other, as
// `order` sorts the examples.
struct Selected {
  ElementType type;  // of x, weight, bias and y
  int64_t batch;
  int64_t sets;
  int64_t places;  // of one example: rows, or height times width of the result
  int64_t tiles;   // at most
  int64_t out;
  int64_t depth;   // inputs of one output: columns of the weight
  int64_t groups;  // of a convolution, else 1
  const void* x;   // [batch, channels, height, width], or of a linear layer [batch, places, depth]
  const void* weight;            // [out, depth]
  const uint8_t* bits;           // [sets, ceil(out * depth / 8)]
  const void* bias;              // [out] or null
  const uint8_t* bias_bits;      // [sets, ceil(out / 8)] or null
  const int64_t* order;          // [batch]
  const int64_t* first_example;  // [sets + 1], of every set in that order
  const int64_t* first_tile;     // [sets + 1]
  void* y;
  // of a convolution
  int channels, height, width;
  int kernel_height, kernel_width;
  int stride_height, stride_width;
  int padding_height, padding_width;  // before
  int dilation_height, dilation_width;
  int out_width;
};

}  // namespace modmask::cuda
