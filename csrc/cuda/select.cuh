// Products with the masks that every example selects. Examples of one set are sorted to lie one
// after the other, and a block has 64 columns of one set: it masks a tile of the weight while it
// reads it and multiplies it with all of them, so that no masked weight exists.
#pragma once

#include "mask.cuh"
#include "select.h"

namespace modmask::cuda {

constexpr int kSelectThreads = 256;
constexpr int kSelectOutputs = 64;
constexpr int kSelectDepth = 16;
constexpr int kSelectStep = 64 + 4;  // rows of a tile start at different banks

inline LaunchShape selected_shape(const Selected& p) {
  const int64_t of_group = p.out / p.groups;
  const int64_t outputs = (of_group + kSelectOutputs - 1) / kSelectOutputs;
  return {
      dim3(static_cast<unsigned>(p.tiles), static_cast<unsigned>(outputs * p.groups)),
      dim3(kSelectThreads)};
}

// The set whose tile this is; `sets` beyond the last.
MODMASK_DEVICE int64_t set_of_tile(const Selected& p, int64_t tile) {
  int64_t low = 0, high = p.sets;  // the first set whose tiles end behind this one
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load(p.first_tile + middle + 1) > tile) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Where a column is.
struct SelectedColumn {
  int64_t example;
  int64_t place;
  bool inside;

  MODMASK_DEVICE SelectedColumn(const Selected& p, int64_t set, int64_t column) {
    const int64_t first = load(p.first_example + set), end = load(p.first_example + set + 1);
    const int64_t of_set = column / p.places;
    inside = of_set < end - first;
    example = inside ? load(p.order + first + of_set) : 0;
    place = column - of_set * p.places;
  }
};

// One input of a convolution: of a place, by its number along a row of the weight.
MODMASK_DEVICE float input_of(
    const Selected& p, int64_t example, int first_channel, int top, int left, int k) {
  const int kernel = p.kernel_height * p.kernel_width;
  const int channel = k / kernel, rest = k - channel * kernel;
  const int ky = rest / p.kernel_width, kx = rest - ky * p.kernel_width;
  const int y = top + ky * p.dilation_height, x = left + kx * p.dilation_width;
  if (y < 0 || y >= p.height || x < 0 || x >= p.width) {
    return 0.0f;
  }
  const int64_t row =
      (example * p.channels + first_channel + channel) * p.height + static_cast<int64_t>(y);
  float v[1];
  load_part(p.type, p.x, row * p.width + x, 1, v);
  return v[0];
}

template <bool kConvolution>
__global__ void __launch_bounds__(kSelectThreads, 2) selected_product(Selected p) {
  MODMASK_SHARED(float, weights, kSelectDepth* kSelectStep);  // [depth][output]
  MODMASK_SHARED(float, columns, kSelectDepth* kSelectStep);  // [depth][column]
  const int64_t tile = blockIdx.x, set = set_of_tile(p, tile);
  if (set >= p.sets) {
    return;
  }
  const int64_t c0 = (tile - load(p.first_tile + set)) * kSelectColumns;
  const int64_t of_group = p.out / p.groups;
  const int64_t tiles_of_group = (of_group + kSelectOutputs - 1) / kSelectOutputs;
  const int64_t conv_group = blockIdx.y / tiles_of_group;
  const int64_t in_group = (blockIdx.y - conv_group * tiles_of_group) * kSelectOutputs;
  const int64_t o0 = conv_group * of_group + in_group;  // of out
  const int64_t outputs =
      of_group - in_group < kSelectOutputs ? of_group - in_group : int64_t{kSelectOutputs};
  const uint8_t* bits = p.bits + set * ((p.out * p.depth + 7) / 8);
  const int thread = static_cast<int>(threadIdx.x);
  // what a thread loads: four inputs of one output, and of one column (of a convolution by places)
  const int of_four = thread / 4, four = thread % 4 * 4;
  const int own = kConvolution ? thread % kSelectColumns : of_four;
  const SelectedColumn mine(p, set, c0 + own);
  const int place_y = kConvolution ? static_cast<int>(mine.place / p.out_width) : 0;
  const int place_x = kConvolution ? static_cast<int>(mine.place) - place_y * p.out_width : 0;
  const int top = place_y * p.stride_height - p.padding_height;
  const int left = place_x * p.stride_width - p.padding_width;
  const int first_channel =
      kConvolution ? static_cast<int>(conv_group * (p.channels / p.groups)) : 0;
  const int to_output = thread / 16 * 4, to_column = thread % 16 * 4;
  float sums[4][4] = {};  // [output][column]
  for (int64_t k0 = 0; k0 < p.depth; k0 += kSelectDepth) {
    __syncthreads();
    {
      const int64_t k = k0 + four, at = (o0 + of_four) * p.depth + k;
      const int64_t here = of_four < outputs ? p.depth - k : 0;
      float w[4];
      load_part(p.type, p.weight, at, here, w);
      uint32_t kept = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < here && (j == 0 || ((at + j) & 7) == 0)) {
          kept |= static_cast<uint32_t>(load(bits + (at + j) / 8)) >> ((at + j) & 7) << j;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[(four + j) * kSelectStep + of_four] = (kept >> j & 1u) != 0 ? w[j] : 0.0f;
      }
    }
    if constexpr (kConvolution) {
#pragma unroll
      for (int j = 0; j < kSelectDepth / 4; ++j) {
        const int depth = thread / kSelectColumns + 4 * j;
        const int64_t k = k0 + depth;
        columns[depth * kSelectStep + own] =
            mine.inside && k < p.depth
                ? input_of(p, mine.example, first_channel, top, left, static_cast<int>(k))
                : 0.0f;
      }
    } else {
      const int64_t k = k0 + four, row = mine.example * p.places + mine.place;
      float v[4];
      load_part(p.type, p.x, row * p.depth + k, mine.inside ? p.depth - k : 0, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        columns[(four + j) * kSelectStep + own] = v[j];
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSelectDepth; ++k) {
      const Vector<float, 4> w = load_vector<4>(weights + (k * kSelectStep + to_output));
      const Vector<float, 4> x = load_vector<4>(columns + (k * kSelectStep + to_column));
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          sums[a][b] = fmaf(w.v[a], x.v[b], sums[a][b]);
        }
      }
    }
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int64_t o = o0 + to_output + a;
    float bias[1] = {0.0f};
    if (p.bias != nullptr && to_output + a < outputs) {
      const uint8_t* kept = p.bias_bits + set * ((p.out + 7) / 8);
      if (p.bias_bits == nullptr || (load(kept + o / 8) >> (o & 7) & 1u) != 0) {
        load_part(p.type, p.bias, o, 1, bias);
      }
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      sums[a][b] += bias[0];
    }
  }
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const SelectedColumn column(p, set, c0 + to_column + b);
    if (!column.inside || to_output >= outputs) {
      continue;
    }
    if constexpr (kConvolution) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        if (to_output + a < outputs) {
          const float v[1] = {sums[a][b]};
          const int64_t row = column.example * p.out + o0 + to_output + a;
          store_part(p.type, p.y, row * p.places + column.place, 1, v);
        }
      }
    } else {
      const float v[4] = {sums[0][b], sums[1][b], sums[2][b], sums[3][b]};
      const int64_t row = column.example * p.places + column.place;
      store_part(p.type, p.y, row * p.out + o0 + to_output, outputs - to_output, v);
    }
  }
}

}  // namespace modmask::cuda
