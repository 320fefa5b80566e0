// The k largest of many scores over many tensors, without sorting or copying them: three passes
// count digits of the scores' keys, which gives the k-th key exactly; then masks are written, of
// equal keys the first. In order, on one stream, for one TopKWorkspace:
//
//   top_k_list, for the tensors
//   top_k_start
//   three times: top_k_count, top_k_digit
//   top_k_ties, top_k_ranks
//   top_k_write or, of one tensor of float32, top_k_cut
//
// Nothing waits for the host; a NaN among the scores sets TopKState::nan, and masks mean nothing.
#pragma once

#include "mask.cuh"

namespace modmask::cuda {

constexpr int kTopKThreads = 256;
constexpr int kTopKEach = 8;                         // scores of a thread: a byte of bits
constexpr int kTopKUnit = kTopKThreads * kTopKEach;  // of one tensor, that a block takes at once
constexpr int kTopKBlocks = 4 * kTopKThreads;        // at most
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

struct TopKTensor {
  const void* scores;
  uint8_t* mask;  // [count] of 0 and 1, or [ceil(count / 8)] where packed
  int64_t count;
  int64_t first_unit;  // units of the tensors before it
};

struct TopKState {
  int64_t left;   // of the keys that equal the threshold in the digits known, how many are kept
  int64_t equal;  // how many these are
  uint32_t threshold;
  uint32_t known;  // bits of it
  uint32_t nan;
};

struct TopKWorkspace {
  TopKState state;
  unsigned long long digits[kDigits];
  int64_t ties[kTopKBlocks];  // keys equal to the threshold per block, then those before it
};

struct TopKParams {
  const TopKTensor* tensors;  // on the device
  int64_t count;              // of tensors
  int64_t units;
  int64_t k;
  bool largest;
  bool packed;
  TopKWorkspace* workspace;
  Cut* cut;  // of top_k_cut
};

// Units of a tensor of so many scores; tensors[t].first_unit is their running sum, `units` the
// whole.
inline int64_t top_k_units(int64_t count) {
  return (count + kTopKUnit - 1) / kTopKUnit;
}

// Of top_k_count, top_k_ties, top_k_write and top_k_cut; units > 0.
inline LaunchShape top_k_shape(const TopKParams& p) {
  return {
      dim3(static_cast<unsigned>(p.units < kTopKBlocks ? p.units : kTopKBlocks)),
      dim3(kTopKThreads), 0};
}

// Of top_k_start, top_k_digit and top_k_ranks.
inline LaunchShape top_k_single_shape() {
  return {dim3(1), dim3(kTopKThreads), 0};
}

// Unsigned numbers in the order of the floats, or in the opposite one; -0 and 0 have the same.
MODMASK_DEVICE uint32_t key_of(float score, bool largest) {
  const float v = MODMASK_ADD(score, 0.0f);
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  bits ^= static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
  return largest ? bits : ~bits;
}

// f(tensor, first, keys, count, scores) for the scores of this thread in every unit of its block,
// in the order of the units; all threads of the block come along, with count = 0 where a thread has
// none.
template <typename T, typename F>
MODMASK_DEVICE void for_keys(const TopKParams& p, const F& f) {
  const int64_t begin = blockIdx.x * p.units / gridDim.x;
  const int64_t end = (blockIdx.x + 1ll) * p.units / gridDim.x;
  int64_t t = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    // the last tensor that begins at or before this unit; empty ones begin where the next does
    int64_t after = p.count;
    while (t + 1 < after) {
      const int64_t middle = (t + after) / 2;
      if (load(&p.tensors[middle].first_unit) <= unit) {
        t = middle;
      } else {
        after = middle;
      }
    }
    const int64_t count = load(&p.tensors[t].count);
    const int64_t first = (unit - load(&p.tensors[t].first_unit)) * kTopKUnit +
                          static_cast<int64_t>(threadIdx.x) * kTopKEach;
    const int64_t left = count - first;
    float scores[kTopKEach];
    load_part(static_cast<const T*>(load(&p.tensors[t].scores)) + first, left, scores);
    uint32_t keys[kTopKEach];
#pragma unroll
    for (int j = 0; j < kTopKEach; ++j) {
      keys[j] = key_of(scores[j], p.largest);
    }
    f(t, first, keys, left < 0 ? 0 : left < kTopKEach ? static_cast<int>(left) : kTopKEach, scores);
  }
}

// The sum of v over the threads before this one, and over all; `sums` has nine places. Begins with
// a barrier.
MODMASK_DEVICE int64_t sum_before(int64_t v, SharedPointer<int64_t> sums, int64_t& total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int64_t sum = v;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int64_t other =
        __shfl_up_sync(kAllLanes, static_cast<long long>(sum), static_cast<unsigned>(by));
    sum += lane >= by ? other : 0;
  }
  __syncthreads();
  if (lane == 31) {
    sums[warp] = sum;
  }
  __syncthreads();
  int64_t before = sum - v;
  total = 0;
#pragma unroll
  for (int w = 0; w < kTopKThreads / 32; ++w) {
    const int64_t of_warp = sums[w];
    before += w < warp ? of_warp : 0;
    total += of_warp;
  }
  return before;
}

constexpr int kTopKListed = 64;

// Tensors that come as arguments, to be listed in the memory of the device.
struct TopKList {
  TopKTensor tensors[kTopKListed];
  int count;
  TopKTensor* to;
};

inline LaunchShape top_k_list_shape() {
  return {dim3(1), dim3(kTopKListed), 0};
}

__global__ void __launch_bounds__(kTopKListed) top_k_list(TopKList p) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < p.count) {
    store(&p.to[t].scores, p.tensors[t].scores);
    store(&p.to[t].mask, p.tensors[t].mask);
    store(&p.to[t].count, p.tensors[t].count);
    store(&p.to[t].first_unit, p.tensors[t].first_unit);
  }
}

__global__ void __launch_bounds__(kTopKThreads) top_k_start(TopKParams p) {
  TopKWorkspace& w = *p.workspace;
  for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kTopKThreads) {
    store(&w.digits[d], 0ull);
  }
  if (threadIdx.x == 0) {
    store(&w.state.left, p.k);
    store(&w.state.equal, int64_t{0});
    store(&w.state.threshold, 0u);
    store(&w.state.known, 0u);
    store(&w.state.nan, 0u);
  }
}

// Counts the next digit of all keys that agree with the threshold in the digits known.
template <typename T>
__global__ void __launch_bounds__(kTopKThreads) top_k_count(TopKParams p) {
  MODMASK_SHARED(uint32_t, digits, kDigits);
  TopKWorkspace& w = *p.workspace;
  const uint32_t threshold = load(&w.state.threshold), known = load(&w.state.known);
  const uint32_t bits = 32 - known < kDigitBits ? 32 - known : kDigitBits;
  const uint32_t shift = 32 - known - bits, last = (1u << bits) - 1u;
  const uint32_t above = known == 0 ? 0u : ~0u << (32 - known);
  for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kTopKThreads) {
    digits[d] = 0u;
  }
  __syncthreads();
  bool nan = false;
  for_keys<T>(
      p, [&](int64_t, int64_t, const uint32_t (&keys)[kTopKEach], int count,
             const float (&scores)[kTopKEach]) {
#pragma unroll
        for (int j = 0; j < kTopKEach; ++j) {
          if (j < count) {
            nan = nan || scores[j] != scores[j];
            if ((keys[j] & above) == threshold) {
              atomicAdd(&digits[keys[j] >> shift & last], 1u);
            }
          }
        }
      });
  if (nan) {
    atomicOr(&w.state.nan, 1u);
  }
  __syncthreads();
  for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kTopKThreads) {
    const uint32_t count = digits[d];
    if (count > 0) {
      atomicAdd(&w.digits[d], static_cast<unsigned long long>(count));
    }
  }
}

// Adds the next digit to the threshold: the largest above which fewer keys lie than are kept.
__global__ void __launch_bounds__(kTopKThreads) top_k_digit(TopKParams p) {
  constexpr int kEach = kDigits / kTopKThreads;
  MODMASK_SHARED(int64_t, sums, kTopKThreads / 32);
  TopKWorkspace& w = *p.workspace;
  const uint32_t known = load(&w.state.known);
  const int64_t left = load(&w.state.left);
  const uint32_t threshold = load(&w.state.threshold);
  const uint32_t bits = 32 - known < kDigitBits ? 32 - known : kDigitBits;
  // thread 0 has the largest digits
  const int top = kDigits - 1 - static_cast<int>(threadIdx.x) * kEach;
  int64_t counts[kEach], mine = 0, total;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    counts[j] = static_cast<int64_t>(load(&w.digits[top - j]));
    mine += counts[j];
    store(&w.digits[top - j], 0ull);
  }
  int64_t above = sum_before(mine, sums, total);
  if (above < left && left <= above + mine) {  // one thread, or none where k = 0
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (above < left && left <= above + counts[j]) {
        const uint32_t digit = static_cast<uint32_t>(top - j);
        store(&w.state.left, left - above);
        store(&w.state.equal, counts[j]);
        store(&w.state.threshold, threshold | digit << (32 - known - bits));
      }
      above += counts[j];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    store(&w.state.known, known + bits);
  }
}

// Whether only some of the keys that equal the threshold are kept.
MODMASK_DEVICE bool is_rationed(const TopKParams& p) {
  const TopKState& s = p.workspace->state;
  return load(&s.left) < load(&s.equal);
}

// How many keys of each block equal the threshold.
template <typename T>
__global__ void __launch_bounds__(kTopKThreads) top_k_ties(TopKParams p) {
  MODMASK_SHARED(int64_t, sums, kTopKThreads / 32);
  if (!is_rationed(p)) {  // alike for all threads
    return;
  }
  const uint32_t threshold = load(&p.workspace->state.threshold);
  int64_t mine = 0, total;
  for_keys<T>(
      p, [&](int64_t, int64_t, const uint32_t (&keys)[kTopKEach], int count,
             const float (&)[kTopKEach]) {
#pragma unroll
        for (int j = 0; j < kTopKEach; ++j) {
          mine += j < count && keys[j] == threshold;
        }
      });
  sum_before(mine, sums, total);
  if (threadIdx.x == 0) {
    store(&p.workspace->ties[blockIdx.x], total);
  }
}

// Sums these up, for as many blocks as top_k_ties had.
__global__ void __launch_bounds__(kTopKThreads) top_k_ranks(TopKParams p) {
  constexpr int kEach = kTopKBlocks / kTopKThreads;
  MODMASK_SHARED(int64_t, sums, kTopKThreads / 32);
  if (!is_rationed(p)) {
    return;
  }
  const int64_t blocks = p.units < kTopKBlocks ? p.units : kTopKBlocks;
  int64_t* ties = p.workspace->ties + threadIdx.x * kEach;
  int64_t counts[kEach], mine = 0, total;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    counts[j] = static_cast<int64_t>(threadIdx.x) * kEach + j < blocks ? load(ties + j) : 0;
    mine += counts[j];
  }
  int64_t before = sum_before(mine, sums, total);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    store(ties + j, before);
    before += counts[j];
  }
}

// f(tensor, first, kept, count, last) likewise: one bit per score that is kept; `last` is the place
// of the last key of all that equals the threshold and is kept, or -1.
template <typename T, typename F>
MODMASK_DEVICE void for_kept(const TopKParams& p, SharedPointer<int64_t> sums, const F& f) {
  const TopKState& s = p.workspace->state;
  const uint32_t threshold = load(&s.threshold);
  const int64_t left = load(&s.left);
  const bool rationed = is_rationed(p);
  int64_t rank = rationed ? load(&p.workspace->ties[blockIdx.x]) : 0;
  for_keys<T>(
      p, [&](int64_t t, int64_t first, const uint32_t (&keys)[kTopKEach], int count,
             const float (&)[kTopKEach]) {
        uint32_t kept = 0, equals = 0;
#pragma unroll
        for (int j = 0; j < kTopKEach; ++j) {
          const bool there = j < count && p.k > 0;
          kept |= static_cast<uint32_t>(there && keys[j] > threshold) << j;
          equals |= static_cast<uint32_t>(there && keys[j] == threshold) << j;
        }
        int last = -1;
        if (rationed) {
          int64_t total, before = rank + sum_before(__popc(equals), sums, total);
          rank += total;
#pragma unroll
          for (int j = 0; j < kTopKEach; ++j) {
            if ((equals >> j & 1u) != 0) {
              kept |= static_cast<uint32_t>(before < left) << j;
              last = before == left - 1 ? j : last;
              ++before;
            }
          }
        } else {
          kept |= equals;
        }
        f(t, first, kept, count, last);
      });
}

template <typename T>
__global__ void __launch_bounds__(kTopKThreads) top_k_write(TopKParams p) {
  MODMASK_SHARED(int64_t, sums, kTopKThreads / 32);
  for_kept<T>(p, sums, [&](int64_t t, int64_t first, uint32_t kept, int count, int) {
    if (count == 0) {
      return;
    }
    uint8_t* mask = load(&p.tensors[t].mask);
    if (p.packed) {
      store(mask + first / 8, static_cast<uint8_t>(kept));
      return;
    }
    if (count == kTopKEach && reinterpret_cast<uintptr_t>(mask + first) % 8 == 0) {
      Vector<uint8_t, 8> bytes;
#pragma unroll
      for (int j = 0; j < kTopKEach; ++j) {
        bytes.v[j] = static_cast<uint8_t>(kept >> j & 1u);
      }
      store_vector<8>(mask + first, bytes);
      return;
    }
#pragma unroll
    for (int j = 0; j < kTopKEach; ++j) {
      if (j < count) {
        store(mask + first + j, static_cast<uint8_t>(kept >> j & 1u));
      }
    }
  });
}

// Where the k largest of one tensor end, for MaskParams::cuts; `largest` must be true.
__global__ void __launch_bounds__(kTopKThreads) top_k_cut(TopKParams p) {
  MODMASK_SHARED(int64_t, sums, kTopKThreads / 32);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const uint32_t threshold = load(&p.workspace->state.threshold), top = 0x80000000u;
    const float value = bits_to_float((threshold & top) != 0 ? threshold ^ top : ~threshold);
    store(&p.cut->value, p.k > 0 ? value : INFINITY);
    if (p.k == 0 || !is_rationed(p)) {
      store(&p.cut->ties, p.k == 0 ? int64_t{0} : load(&p.tensors[0].count));
    }
  }
  if (p.k == 0 || !is_rationed(p)) {
    return;
  }
  for_kept<float>(p, sums, [&](int64_t, int64_t first, uint32_t, int, int last) {
    if (last >= 0) {
      store(&p.cut->ties, first + last + 1);
    }
  });
}

}  // namespace modmask::cuda
