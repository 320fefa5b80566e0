// y = x (W * M)^T for few rows per mask: every block reads a tile of the weight once, draws it (or
// reads its bits) for the masks of up to eight jobs, and multiplies from shared memory. No tensor
// with a value per weight exists but the gradients. A job is up to kRows rows of one mask.
//
// Sums over a split of the depth go to `partials`; finish_linear adds these up in their order, so
// that results do not depend on timing.
#pragma once

#include "mask.cuh"
#include "masked_linear.h"

namespace modmask::cuda {

constexpr int kLinearThreads = 256;
constexpr int kLinearWarps = kLinearThreads / 32;
constexpr int kTileOutputs = 32;
constexpr int kTileInputs = 128;
constexpr int kTileStep = kTileInputs + 4;  // rows of a tile start at different banks
constexpr int kOutputStep = kTileOutputs + 4;

// Which kernel computes what, and how it is cut; from shapes only, so that equal calls give equal
// bits on every device.
struct LinearPlan {
  bool backward;        // dx, from dy; else y, from x
  int job_rows;         // kRows of the kernel: 1, 4 or 8
  int jobs;             // per block, at most; 1 ... 8
  int64_t sample_jobs;  // jobs of one mask
  int64_t set_jobs;     // jobs of one set
  int64_t chunks;       // blocks that share them
  int64_t depth;        // inputs (backward: outputs) that a block adds up
  int64_t splits;
  LaunchShape shape;  // shared memory may exceed 48 KiB: ask for it
};

// Where every row has its own mask, as in select_linear, rows = 1 and the samples are the batch.
inline LinearPlan plan_linear(
    int64_t in,
    int64_t out,
    int64_t rows,
    int64_t samples,
    int64_t sets,
    bool soft,
    bool backward) {
  LinearPlan p{};
  p.backward = backward;
  p.job_rows = soft || rows > 4 ? 8 : rows > 1 ? 4 : 1;
  p.sample_jobs = (rows + p.job_rows - 1) / p.job_rows;
  p.set_jobs = samples * p.sample_jobs;
  const int64_t most = soft ? 2 : 8;  // soft masks take 16 KiB each
  p.jobs = static_cast<int>(p.set_jobs < most ? p.set_jobs : most);
  p.chunks = (p.set_jobs + p.jobs - 1) / p.jobs;
  const int64_t depth = backward ? out : in, width = backward ? in : out;
  const int64_t step = backward ? kTileOutputs : kTileInputs;
  const int64_t tile = backward ? kTileInputs : kTileOutputs;
  const int64_t tiles = (width + tile - 1) / tile;
  // four blocks for each of 132 multiprocessors, but at least two steps of 16 KiB of float32 weight
  const int64_t blocks = tiles * p.chunks * sets;
  const int64_t depth_steps = (depth + step - 1) / step;
  const int64_t wanted = (528 + blocks - 1) / blocks;
  const int64_t most_splits = (depth_steps + 1) / 2;
  int64_t splits = wanted < most_splits ? wanted : most_splits;
  splits = splits < 1 ? 1 : splits;
  p.depth = (depth_steps + splits - 1) / splits * step;
  p.depth = p.depth < step ? step : p.depth;
  p.splits = depth > 0 ? (depth + p.depth - 1) / p.depth : 1;
  const size_t of_masks =
      soft ? sizeof(float) * kTileOutputs * kTileStep : sizeof(uint32_t) * 4 * kTileOutputs;
  const size_t of_rows = sizeof(float) * (backward ? kOutputStep : kTileStep);
  p.shape = {
      dim3(
          static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits),
          static_cast<unsigned>(sets * p.chunks)),
      dim3(kLinearThreads),
      sizeof(float) * kTileOutputs * kTileStep + p.jobs * of_masks + p.jobs * p.job_rows * of_rows};
  return p;
}

struct LinearParams {
  MaskedLinear layer;
  LinearPlan plan;
  const void* from;  // x [batch, in]; backward: dy [batch, out]
  float* partials;   // [splits, batch, out]; backward: [splits, batch, in]
};

inline LinearParams linear_params(
    const MaskedLinear& l, bool backward, const void* from, float* partials) {
  const bool soft = !l.hard && l.packed.bits == nullptr;
  return {
      l, plan_linear(l.in, l.out, l.rows, l.mask.samples, l.mask.sets, soft, backward), from,
      partials};
}

// What a block and a warp of it compute.
template <int kRows>
struct LinearBlock {
  int64_t set;
  int64_t first;  // job of the set
  int jobs;
  int64_t first_sample;
  int samples;  // whose masks it needs
  int lane, warp;
  // The job of this warp and which part of each tile it multiplies; job < 0: none.
  int job, part, parts;
  int sample;         // counted from first_sample
  int64_t first_row;  // of the batch
  int rows;

  MODMASK_DEVICE explicit LinearBlock(const LinearParams& p) {
    const int64_t chunks = p.plan.chunks;
    set = blockIdx.z / chunks;
    first = blockIdx.z % chunks * p.plan.jobs;
    const int64_t left = p.plan.set_jobs - first;
    jobs = static_cast<int>(left < p.plan.jobs ? left : p.plan.jobs);
    first_sample = first / p.plan.sample_jobs;
    samples = static_cast<int>((first + jobs - 1) / p.plan.sample_jobs - first_sample) + 1;
    lane = static_cast<int>(threadIdx.x % 32);
    warp = static_cast<int>(threadIdx.x / 32);
    parts = kLinearWarps / jobs;
    parts = parts >= 8 ? 8 : parts >= 4 ? 4 : parts >= 2 ? 2 : 1;
    job = warp < jobs * parts ? warp % jobs : -1;
    part = warp / jobs;
    row_range(p, job < 0 ? 0 : job, sample, first_row, rows);
  }

  MODMASK_DEVICE void row_range(
      const LinearParams& p, int of_job, int& of_sample, int64_t& begin, int& count) const {
    const int64_t j = first + of_job, k = j / p.plan.sample_jobs;
    const int64_t row = (j - k * p.plan.sample_jobs) * kRows, left = p.layer.rows - row;
    of_sample = static_cast<int>(k - first_sample);
    begin = (set * p.layer.mask.samples + k) * p.layer.rows + row;
    count = static_cast<int>(left < kRows ? left : kRows);
  }
};

MODMASK_DEVICE Vector<float, 4> vector_of(const float (&v)[4]) {
  return {{v[0], v[1], v[2], v[3]}};
}

// Up to four bits from bit `at` on.
MODMASK_DEVICE uint32_t four_bits(const uint8_t* bits, int64_t at, int64_t left) {
  const int shift = static_cast<int>(at & 7);
  const int count = static_cast<int>(left < 4 ? left : 4);
  if (count <= 0) {
    return 0;
  }
  uint32_t v = load(bits + at / 8);
  if (shift + count > 8) {
    v |= static_cast<uint32_t>(load(bits + at / 8 + 1)) << 8;
  }
  return v >> shift;
}

// A tile of the weight from row o0 and column i0 on, zeros beyond the ends, and its masks: words j
// of row o of a sample have bit l for column 4 l + j. Soft masks are values instead.
template <MaskMode kMode, bool kSoft, int kRows>
MODMASK_DEVICE void load_tile(
    const LinearParams& p,
    const LinearBlock<kRows>& b,
    int64_t o0,
    int64_t i0,
    SharedPointer<float> weights,
    SharedPointer<uint32_t> masks,
    SharedPointer<float> soft) {
  const MaskedLinear& layer = p.layer;
  const MaskParams& m = layer.mask;
  const float* of_set = layer.logits + (m.shared ? 0 : b.set * layer.out * layer.in);
  const int64_t i = i0 + 4 * b.lane;
  const Cut cut = kMode == MaskMode::kGeneral ? cut_of(m, b.set) : Cut{0.0f, 0};
  for (int q = b.warp; q < kTileOutputs; q += kLinearWarps) {  // alike for all lanes of a warp
    const int64_t o = o0 + q, at = o * layer.in + i, left = o < layer.out ? layer.in - i : 0;
    float w[4], logits[4] = {}, e[4] = {};
    load_part(layer.type, layer.weight, at, left, w);
    store_vector<4>(weights + (q * kTileStep + 4 * b.lane), vector_of(w));
    if (kMode != MaskMode::kPacked) {
      load_part(of_set + at, left, logits);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        e[j] = exp_minus(logits[j]);
      }
    }
    for (int s = 0; s < b.samples; ++s) {
      const int64_t k = b.first_sample + s;
      uint32_t kept = 0;
      float values[4] = {};
      if (kMode == MaskMode::kPacked) {
        const MaskBits& packed = layer.packed;
        const uint8_t* bits =
            packed.bits + (layer.row_sets != nullptr
                               ? load(layer.row_sets + k) * packed.set_stride
                               : b.set * packed.set_stride + k * packed.sample_stride);
        kept = four_bits(bits, at, left);
      } else {
        const Draws d = draws_of(m, b.set, k);
        uint32_t words[4] = {};
        if (kMode == MaskMode::kPlain || has_noise(m)) {
          words_from(m, d, static_cast<uint64_t>(m.element_offset + at), words);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const MaskValue v = mask_value<kMode, kSoft>(m, cut, logits[j], e[j], words[j], at + j);
          kept |= static_cast<uint32_t>(v.kept) << j;
          values[j] = v.value;
        }
      }
      if (kSoft) {
        store_vector<4>(
            soft + ((s * kTileOutputs + q) * kTileStep + 4 * b.lane), vector_of(values));
      } else {
        uint32_t mine = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t word = __ballot_sync(kAllLanes, kept >> j & 1u);
          mine = b.lane == j ? word : mine;
        }
        if (b.lane < 4) {
          masks[(s * kTileOutputs + q) * 4 + b.lane] = mine;
        }
      }
    }
  }
}

// Columns [c0, c0 + kColumns) of the rows of all jobs as float, zeros where there are none.
template <int kColumns, int kRows>
MODMASK_DEVICE void load_rows(
    const LinearParams& p,
    const LinearBlock<kRows>& b,
    int64_t columns,
    int64_t c0,
    SharedPointer<float> to) {
  constexpr int kQuads = kColumns / 4;
  for (int q = static_cast<int>(threadIdx.x); q < b.jobs * kRows * kQuads; q += kLinearThreads) {
    const int row = q / kQuads, c = 4 * (q % kQuads);
    int sample, count;
    int64_t begin;
    b.row_range(p, row / kRows, sample, begin, count);
    float v[4];
    load_part(
        p.layer.type, p.from, (begin + row % kRows) * columns + c0 + c,
        row % kRows < count ? columns - c0 - c : 0, v);
    store_vector<4>(to + (row * (kColumns + 4) + c), vector_of(v));
  }
}

// Adds up what the warps of one job have, in their order, where the first one has its own.
template <int kCount, int kRows>
MODMASK_DEVICE void add_parts(
    const LinearBlock<kRows>& b, SharedPointer<float> buffer, float (&sums)[kCount]) {
  for (int part = 1; part < b.parts; ++part) {
    __syncthreads();
    if (b.job >= 0 && b.part == part) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        buffer[(b.job * kCount + j) * 32 + b.lane] = sums[j];
      }
    }
    __syncthreads();
    if (b.job >= 0 && b.part == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        sums[j] += buffer[(b.job * kCount + j) * 32 + b.lane];
      }
    }
  }
}

// Where the shared memory of a block begins that each of these has.
template <bool kSoft>
struct LinearShared {
  SharedPointer<float> weights;
  SharedPointer<uint32_t> masks;
  SharedPointer<float> soft;
  SharedPointer<float> rows;

  MODMASK_DEVICE LinearShared(SharedPointer<unsigned char> memory, const LinearParams& p) {
    const size_t of_weights = sizeof(float) * kTileOutputs * kTileStep;
    const size_t of_masks = kSoft ? of_weights : sizeof(uint32_t) * 4 * kTileOutputs;
    weights = shared_cast<float>(memory);
    masks = shared_cast<uint32_t>(memory + of_weights);
    soft = shared_cast<float>(memory + of_weights);
    rows = shared_cast<float>(memory + (of_weights + p.plan.jobs * of_masks));
  }
};

// partials of y; plan_linear(..., backward = false).
template <MaskMode kMode, bool kSoft, int kRows>
__global__ void __launch_bounds__(kLinearThreads, 2) masked_linear_forward(LinearParams p) {
  MODMASK_DYNAMIC_SHARED(memory);
  const LinearShared<kSoft> shared(memory, p);
  const LinearBlock<kRows> b(p);
  const int64_t o0 = static_cast<int64_t>(blockIdx.x) * kTileOutputs;
  const int64_t begin = blockIdx.y * p.plan.depth;
  const int64_t end = begin + p.plan.depth < p.layer.in ? begin + p.plan.depth : p.layer.in;
  float sums[kRows] = {};  // of output `lane`
  for (int64_t i0 = begin; i0 < end; i0 += kTileInputs) {
    __syncthreads();
    load_tile<kMode, kSoft>(p, b, o0, i0, shared.weights, shared.masks, shared.soft);
    load_rows<kTileInputs>(p, b, p.layer.in, i0, shared.rows);
    __syncthreads();
    if (b.job < 0) {
      continue;
    }
    const int row = b.sample * kTileOutputs + b.lane, quads = kTileInputs / 4 / b.parts;
    Vector<uint32_t, 4> words{};
    if (!kSoft) {
      words = load_vector<4>(shared.masks + row * 4);
    }
    for (int c = b.part * quads; c < (b.part + 1) * quads; ++c) {
      Vector<float, 4> w = load_vector<4>(shared.weights + (b.lane * kTileStep + 4 * c));
      if (kSoft) {
        const Vector<float, 4> v = load_vector<4>(shared.soft + (row * kTileStep + 4 * c));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w.v[j] *= v.v[j];
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w.v[j] = (words.v[j] >> c & 1u) != 0 ? w.v[j] : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Vector<float, 4> x =
            load_vector<4>(shared.rows + ((b.job * kRows + r) * kTileStep + 4 * c));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[r] = fmaf(w.v[j], x.v[j], sums[r]);
        }
      }
    }
  }
  add_parts(b, shared.weights, sums);
  const int64_t batch = p.layer.batch();
  if (b.job >= 0 && b.part == 0 && o0 + b.lane < p.layer.out) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < b.rows) {
        store(
            p.partials + (blockIdx.y * batch + b.first_row + r) * p.layer.out + o0 + b.lane,
            sums[r]);
      }
    }
  }
}

// partials of dx; plan_linear(..., backward = true).
template <MaskMode kMode, bool kSoft, int kRows>
__global__ void __launch_bounds__(kLinearThreads, 2) masked_linear_dx(LinearParams p) {
  MODMASK_DYNAMIC_SHARED(memory);
  const LinearShared<kSoft> shared(memory, p);
  const LinearBlock<kRows> b(p);
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * kTileInputs;
  const int64_t begin = blockIdx.y * p.plan.depth;
  const int64_t end = begin + p.plan.depth < p.layer.out ? begin + p.plan.depth : p.layer.out;
  float sums[4 * kRows] = {};  // of columns 4 lane + j
  for (int64_t o0 = begin; o0 < end; o0 += kTileOutputs) {
    __syncthreads();
    load_tile<kMode, kSoft>(p, b, o0, i0, shared.weights, shared.masks, shared.soft);
    load_rows<kTileOutputs>(p, b, p.layer.out, o0, shared.rows);
    __syncthreads();
    if (b.job < 0) {
      continue;
    }
    const int outputs = kTileOutputs / b.parts;
    for (int o = b.part * outputs; o < (b.part + 1) * outputs; o += 4) {
      Vector<float, 4> w[4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int row = b.sample * kTileOutputs + o + a;
        w[a] = load_vector<4>(shared.weights + ((o + a) * kTileStep + 4 * b.lane));
        if (kSoft) {
          const Vector<float, 4> v = load_vector<4>(shared.soft + (row * kTileStep + 4 * b.lane));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w[a].v[j] *= v.v[j];
          }
        } else {
          const Vector<uint32_t, 4> words = load_vector<4>(shared.masks + row * 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w[a].v[j] = (words.v[j] >> b.lane & 1u) != 0 ? w[a].v[j] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Vector<float, 4> dy =
            load_vector<4>(shared.rows + ((b.job * kRows + r) * kOutputStep + o));
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[4 * r + j] = fmaf(dy.v[a], w[a].v[j], sums[4 * r + j]);
          }
        }
      }
    }
  }
  add_parts(b, shared.weights, sums);
  const int64_t batch = p.layer.batch(), i = i0 + 4 * b.lane;
  if (b.job >= 0 && b.part == 0 && i < p.layer.in) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < b.rows) {
        const float four[4] = {sums[4 * r], sums[4 * r + 1], sums[4 * r + 2], sums[4 * r + 3]};
        store_part(
            p.partials + (blockIdx.y * batch + b.first_row + r) * p.layer.in + i, p.layer.in - i,
            four);
      }
    }
  }
}

constexpr int kGradientRows = 16;     // of a sample, at once
constexpr int kGradientOutputs = 16;  // of a block

struct LinearGradientParams {
  MaskedLinear layer;
  const void* x;   // [batch, in]
  const void* dy;  // [batch, out]
  float* dlogits;  // [sets, out, in] or null
  void* dweight;   // [out, in] or null
};

inline LaunchShape linear_gradient_shape(const LinearGradientParams& p) {
  const MaskedLinear& l = p.layer;
  const int64_t tiles =
      (l.in + kTileInputs - 1) / kTileInputs * ((l.out + kGradientOutputs - 1) / kGradientOutputs);
  // dweight is a sum over sets
  const int64_t sets = p.dweight != nullptr ? 1 : l.mask.sets;
  return {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(sets)), dim3(kLinearThreads), 0};
}

// With D = dy^T x of a group: dlogits = weight * sum over samples of slope * D, and with kWeight
// dweight = sum over groups of mask * D. Every weight and logit is read once, or with kWeight once
// a set, and results are written once; a thread has 2 x 4 weights. n of m has the slopes of
// kGeneral, and with kWeight its masks as bits.
template <MaskMode kMode, bool kWeight>
__global__ void __launch_bounds__(kLinearThreads, 2)
    masked_linear_gradients(LinearGradientParams p) {
  MODMASK_SHARED(float, x, kGradientRows* kTileStep);
  MODMASK_SHARED(float, dy, kGradientRows* kGradientOutputs);
  constexpr int kOfThread = kGradientOutputs / kLinearWarps;
  const MaskedLinear& l = p.layer;
  const MaskParams& m = l.mask;
  const int64_t tiles = (l.in + kTileInputs - 1) / kTileInputs;
  const int64_t i0 = blockIdx.x % tiles * kTileInputs, o0 = blockIdx.x / tiles * kGradientOutputs;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t i = i0 + 4 * lane;
  float dweight[kOfThread][4] = {};
  const int64_t first_set = kWeight ? 0 : blockIdx.y, end = kWeight ? m.sets : first_set + 1;
  for (int64_t set = first_set; set < end; ++set) {
    const Cut cut = kMode == MaskMode::kGeneral ? cut_of(m, set) : Cut{0.0f, 0};
    const float* of_set = l.logits + (m.shared ? 0 : set * l.out * l.in);
    float logits[kOfThread][4], e[kOfThread][4], sums[kOfThread][4] = {};
#pragma unroll
    for (int a = 0; a < kOfThread; ++a) {
      const int64_t o = o0 + kOfThread * warp + a;
      load_part(of_set + o * l.in + i, o < l.out ? l.in - i : 0, logits[a]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        e[a][j] = exp_minus(logits[a][j]);
      }
    }
    for (int64_t k = 0; k < m.samples; ++k) {
      float dots[kOfThread][4] = {};
      for (int64_t r0 = 0; r0 < l.rows; r0 += kGradientRows) {
        const int64_t row = (set * m.samples + k) * l.rows + r0;
        const int count =
            static_cast<int>(l.rows - r0 < kGradientRows ? l.rows - r0 : kGradientRows);
        __syncthreads();
        for (int r = warp; r < count; r += kLinearWarps) {
          float v[4];
          load_part(l.type, p.x, (row + r) * l.in + i, l.in - i, v);
          store_vector<4>(x + (r * kTileStep + 4 * lane), vector_of(v));
          if (lane < kGradientOutputs / 4) {
            const int64_t o = o0 + 4 * lane;
            load_part(l.type, p.dy, (row + r) * l.out + o, l.out - o, v);
            store_vector<4>(dy + (r * kGradientOutputs + 4 * lane), vector_of(v));
          }
        }
        __syncthreads();
        for (int r = 0; r < count; ++r) {
          const Vector<float, 4> columns = load_vector<4>(x + (r * kTileStep + 4 * lane));
          const Vector<float, kOfThread> outputs =
              load_vector<kOfThread>(dy + (r * kGradientOutputs + kOfThread * warp));
#pragma unroll
          for (int a = 0; a < kOfThread; ++a) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              dots[a][j] = fmaf(outputs.v[a], columns.v[j], dots[a][j]);
            }
          }
        }
      }
      const Draws d = draws_of(m, set, k);
#pragma unroll
      for (int a = 0; a < kOfThread; ++a) {
        const int64_t o = o0 + kOfThread * warp + a, at = o * l.in + i;
        uint32_t words[4] = {}, kept = 0;
        if (kMode == MaskMode::kPlain || has_noise(m)) {
          words_from(m, d, static_cast<uint64_t>(m.element_offset + at), words);
        }
        if (kWeight && l.packed.bits != nullptr) {
          const uint8_t* bits =
              l.packed.bits + set * l.packed.set_stride + k * l.packed.sample_stride;
          kept = four_bits(bits, at, o < l.out ? l.in - i : 0);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const MaskValue v =
              mask_value<kMode, true>(m, cut, logits[a][j], e[a][j], words[j], at + j);
          sums[a][j] = fmaf(v.slope, dots[a][j], sums[a][j]);
          if (kWeight) {
            const bool here = l.packed.bits != nullptr ? (kept >> j & 1u) != 0 : v.kept;
            const float value = l.hard ? (here ? 1.0f : 0.0f) : v.value;
            dweight[a][j] = fmaf(value, dots[a][j], dweight[a][j]);
          }
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kOfThread; ++a) {
      const int64_t o = o0 + kOfThread * warp + a;
      if (p.dlogits != nullptr && o < l.out) {
        float w[4];
        load_part(l.type, l.weight, o * l.in + i, l.in - i, w);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[j] *= sums[a][j];
        }
        store_part(p.dlogits + (set * l.out + o) * l.in + i, l.in - i, w);
      }
    }
  }
  if (kWeight) {
#pragma unroll
    for (int a = 0; a < kOfThread; ++a) {
      const int64_t o = o0 + kOfThread * warp + a;
      if (o < l.out) {
        store_part(l.type, p.dweight, o * l.in + i, l.in - i, dweight[a]);
      }
    }
  }
}

struct FinishParams {
  MaskedLinear layer;
  const float* partials;  // [splits, batch, columns]
  int64_t splits;
  int64_t columns;
  void* to;     // [batch, columns]
  bool biased;  // adds the bias of the layer
};

inline FinishParams finish_params(const LinearParams& p, void* to) {
  const bool backward = p.plan.backward;
  return {
      p.layer,
      p.partials,
      p.plan.splits,
      backward ? p.layer.in : p.layer.out,
      to,
      !backward && p.layer.bias != nullptr};
}

constexpr int kFinishThreads = 256;

inline LaunchShape finish_shape(const FinishParams& p) {
  const int64_t blocks = (p.layer.batch() * p.columns + kFinishThreads - 1) / kFinishThreads;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kFinishThreads), 0};
}

// The mask of one weight by itself; the value is 0 or 1 where masks are hard.
MODMASK_DEVICE MaskValue single_mask(
    const MaskParams& p,
    bool hard,
    const float* logits,
    int64_t count,
    int64_t set,
    int64_t k,
    int64_t i) {
  const float logit = load(logits + (p.shared ? 0 : set * count) + i);
  const uint32_t word = word_at(p, draws_of(p, set, k), i);
  MaskValue v =
      mask_value<MaskMode::kGeneral, true>(p, cut_of(p, set), logit, exp_minus(logit), word, i);
  if (hard) {
    v.value = v.kept ? 1.0f : 0.0f;
  }
  return v;
}

// The sums of all splits in their order, plus the bias under its mask.
__global__ void __launch_bounds__(kFinishThreads) finish_linear(FinishParams p) {
  const MaskedLinear& l = p.layer;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int64_t count = l.batch() * p.columns;
  if (at >= count) {
    return;
  }
  float sum = 0.0f;
  for (int64_t s = 0; s < p.splits; ++s) {
    sum += load(p.partials + s * count + at);
  }
  if (p.biased) {
    const int64_t row = at / p.columns, column = at - row * p.columns;
    float bias[1];
    load_part(l.type, l.bias, column, 1, bias);
    if (l.bias_logits != nullptr) {
      const int64_t group = row / l.rows, set = group / l.mask.samples;
      const MaskValue v = single_mask(
          l.bias_mask, l.hard, l.bias_logits, p.columns, set, group - set * l.mask.samples, column);
      bias[0] = l.hard ? (v.kept ? bias[0] : 0.0f) : bias[0] * v.value;
    } else if (l.bias_bits != nullptr) {
      const uint8_t* bits = l.bias_bits + load(l.row_sets + row) * ((p.columns + 7) / 8);
      bias[0] = (load(bits + column / 8) >> (column % 8) & 1u) != 0 ? bias[0] : 0.0f;
    }
    sum += bias[0];
  }
  const float result[1] = {sum};
  store_part(l.type, p.to, at, 1, result);
}

struct BiasGradientParams {
  MaskedLinear layer;
  const float* sums;    // [sets * samples, out]: dy, added up over the rows of each group
  void* dbias;          // [out] or null
  float* dbias_logits;  // [sets, out] or null
};

inline LaunchShape bias_gradient_shape(const BiasGradientParams& p) {
  return {dim3(static_cast<unsigned>((p.layer.out + 31) / 32)), dim3(32), 0};
}

// One thread per output, over all groups in their order.
__global__ void __launch_bounds__(32) bias_gradients(BiasGradientParams p) {
  const MaskedLinear& l = p.layer;
  const int64_t o = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  if (o >= l.out) {
    return;
  }
  float bias[1], dbias[1] = {0.0f};
  load_part(l.type, l.bias, o, 1, bias);
  for (int64_t set = 0; set < l.mask.sets; ++set) {
    float dlogit = 0.0f;
    for (int64_t k = 0; k < l.mask.samples; ++k) {
      const float sum = load(p.sums + (set * l.mask.samples + k) * l.out + o);
      const MaskValue v = single_mask(l.bias_mask, l.hard, l.bias_logits, l.out, set, k, o);
      dbias[0] += v.value * sum;
      dlogit += v.slope * sum;
    }
    if (p.dbias_logits != nullptr) {
      store(p.dbias_logits + set * l.out + o, dlogit * bias[0]);
    }
  }
  if (p.dbias != nullptr) {
    store_part(l.type, p.dbias, o, 1, dbias);
  }
}

}  // namespace modmask::cuda
