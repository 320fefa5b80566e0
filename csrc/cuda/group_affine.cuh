// Channels scaled and shifted by the masked parameters of their group, and the gradients of both:
// what masks of normalisations, and masks over whole inputs or outputs of a layer, come to.
//
// The gradients are sums over rows. A block adds up some rows in a fixed order and leaves its sums
// in `partials`; group_affine_finish adds these up in theirs, so that results do not depend on
// timing. The gradient of x is written by the way.
#pragma once

#include "group_affine.h"
#include "mask.cuh"

namespace modmask::cuda {

constexpr int kAffineThreads = 256;
constexpr int kAffineWarps = kAffineThreads / 32;
constexpr int kAffineCount = 8;       // elements of a thread
constexpr int kAffineChannels = 128;  // of a block that adds up rows of channels

struct GroupAffineParams {
  GroupAffine affine;
  int64_t count;  // of elements
  const void* x;
  void* y;
};

inline GroupAffineParams group_affine_params(const GroupAffine& a, const void* x, void* y) {
  return {a, a.count(), x, y};
}

inline LaunchShape group_affine_shape(const GroupAffineParams& p) {
  const int64_t of_block = kAffineThreads * kAffineCount;
  return {dim3(static_cast<unsigned>((p.count + of_block - 1) / of_block)), dim3(kAffineThreads)};
}

// y, or with the gradient of y as x that of x.
__global__ void __launch_bounds__(kAffineThreads) group_affine(GroupAffineParams p) {
  const GroupAffine& a = p.affine;
  const int64_t at =
      (static_cast<int64_t>(blockIdx.x) * kAffineThreads + threadIdx.x) * kAffineCount;
  if (at >= p.count) {
    return;
  }
  const int64_t left = p.count - at;
  float v[kAffineCount];
  load_part(a.type, p.x, at, left, v);
  const int64_t line = at / a.inner, row = line / a.channels, group = row / a.rows;
  int64_t place = at - line * a.inner, channel = line - row * a.channels;
  int64_t in_group = row - group * a.rows;
  int64_t first = group * a.channels;  // of the group's channels
#pragma unroll
  for (int j = 0; j < kAffineCount; ++j) {
    if (j < left) {
      v[j] *= load(a.scale + first + channel);
      if (a.shift != nullptr) {
        v[j] += load(a.shift + first + channel);
      }
      if (++place == a.inner) {
        place = 0;
        if (++channel == a.channels) {
          channel = 0;
          if (++in_group == a.rows) {
            in_group = 0;
            first += a.channels;
          }
        }
      }
    }
  }
  store_part(a.type, p.y, at, left, v);
}

struct GroupAffineBackwardParams {
  GroupAffine affine;
  const void* dy;
  const void* x;    // null where the gradient of scale is not asked for
  void* dx;         // or null
  float* partials;  // [splits, 2, groups, channels]: of scale, of shift
  int64_t splits;
  int64_t depth;  // rows of a block
  int64_t tiles;  // blocks along the channels
  int lanes;      // that share one line, where inner > 1
};

// From shapes only, so that equal calls give equal bits on every device.
inline GroupAffineBackwardParams group_affine_backward_params(
    const GroupAffine& a, const void* dy, const void* x, void* dx, float* partials) {
  GroupAffineBackwardParams p{a, dy, x, dx, partials, 1, 0, 0, 1};
  while (p.lanes < kAffineThreads && p.lanes * 4 < a.inner) {
    p.lanes *= 2;
  }
  p.tiles = a.inner > 1 ? a.channels : (a.channels + kAffineChannels - 1) / kAffineChannels;
  // four blocks for each of 132 multiprocessors, but at least 16 rows for each part of a block
  const int64_t at_once = a.inner > 1 ? kAffineThreads / p.lanes : kAffineWarps;
  const int64_t blocks = p.tiles * a.groups;
  const int64_t wanted = (528 + blocks - 1) / blocks,
                most = (a.rows + 16 * at_once - 1) / at_once / 16;
  const int64_t splits = wanted < most ? wanted : most;
  p.depth = (a.rows + splits - 1) / splits;
  p.splits = (a.rows + p.depth - 1) / p.depth;
  return p;
}

inline LaunchShape group_affine_backward_shape(const GroupAffineBackwardParams& p) {
  return {
      dim3(static_cast<unsigned>(p.tiles * p.affine.groups), static_cast<unsigned>(p.splits)),
      dim3(kAffineThreads)};
}

// dscale and dshift of some rows of a group: with kLines of one channel, whose lines of `inner`
// elements lie together, else of kAffineChannels channels of one element.
template <bool kLines>
__global__ void __launch_bounds__(kAffineThreads, 4)
    group_affine_backward(GroupAffineBackwardParams p) {
  MODMASK_SHARED(float, buffer, kLines ? 2 * kAffineWarps : 2 * kAffineWarps * kAffineChannels);
  const GroupAffine& a = p.affine;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t group = blockIdx.x / p.tiles, tile = blockIdx.x - group * p.tiles;
  const int64_t begin = blockIdx.y * p.depth;
  const int64_t end = begin + p.depth < a.rows ? begin + p.depth : a.rows;
  const int64_t c = kLines ? tile : tile * kAffineChannels + 4 * lane;
  const int together = kLines ? p.lanes : 32;
  const int first = thread / together, stride = kAffineThreads / together;
  const int64_t start = kLines ? 4 * (thread % together) : 0, step = kLines ? 4 * together : 4;
  const int64_t length = kLines ? a.inner : 1;
  float scale[4], sums[2][4] = {};
  load_part(a.scale + group * a.channels + c, kLines ? 1 : a.channels - c, scale);
  for (int64_t row = begin + first; row < end; row += stride) {
    for (int64_t i = start; i < length; i += step) {
      const int64_t at = ((group * a.rows + row) * a.channels + c) * a.inner + i;
      const int64_t left = kLines ? a.inner - i : a.channels - c;
      float dy[4], x[4] = {};
      load_part(a.type, p.dy, at, left, dy);
      if (p.x != nullptr) {
        load_part(a.type, p.x, at, left, x);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[0][j] = fmaf(dy[j], x[j], sums[0][j]);
        sums[1][j] += dy[j];
        dy[j] *= kLines ? scale[0] : scale[j];
      }
      if (p.dx != nullptr) {
        store_part(a.type, p.dx, at, left, dy);
      }
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    if constexpr (kLines) {
      float sum = sums[which][0] + sums[which][1] + sums[which][2] + sums[which][3];
#pragma unroll
      for (int by = 16; by > 0; by /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, by);
      }
      if (lane == 0) {
        buffer[which * kAffineWarps + warp] = sum;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        buffer[(which * kAffineWarps + warp) * kAffineChannels + 4 * lane + j] = sums[which][j];
      }
    }
  }
  __syncthreads();
  constexpr int kWidth = kLines ? 1 : kAffineChannels;
  if (thread < 2 * kWidth) {
    const int which = thread / kWidth, column = thread % kWidth;
    const int64_t channel = tile * kWidth + column;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kAffineWarps; ++w) {
      sum += buffer[(which * kAffineWarps + w) * kWidth + column];
    }
    if (channel < a.channels) {
      store(p.partials + ((blockIdx.y * 2 + which) * a.groups + group) * a.channels + channel, sum);
    }
  }
}

struct GroupAffineFinishParams {
  const float* partials;  // [splits, 2, count]
  int64_t splits;
  int64_t count;  // groups * channels
  float* dscale;  // [count] or null
  float* dshift;
};

inline GroupAffineFinishParams group_affine_finish_params(
    const GroupAffineBackwardParams& p, float* dscale, float* dshift) {
  return {p.partials, p.splits, p.affine.groups * p.affine.channels, dscale, dshift};
}

inline LaunchShape group_affine_finish_shape(const GroupAffineFinishParams& p) {
  const int64_t blocks = (p.count + kAffineThreads - 1) / kAffineThreads;
  return {dim3(static_cast<unsigned>(blocks), 2), dim3(kAffineThreads)};
}

__global__ void __launch_bounds__(kAffineThreads) group_affine_finish(GroupAffineFinishParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kAffineThreads + threadIdx.x;
  float* to = blockIdx.y == 0 ? p.dscale : p.dshift;
  if (at >= p.count || to == nullptr) {
    return;
  }
  float sum = 0.0f;
  for (int64_t s = 0; s < p.splits; ++s) {
    sum += load(p.partials + (2 * s + blockIdx.y) * p.count + at);
  }
  store(to + at, sum);
}

}  // namespace modmask::cuda
