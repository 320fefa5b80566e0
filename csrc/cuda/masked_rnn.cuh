// The time loop of a masked LSTM or GRU, forward and backward, in one launch each.
//
// A block owns some hidden units of one group (one mask) for the whole sequence and keeps their
// rows (forward) or columns (backward) of the masked recurrent weight in shared memory: the weight
// and the mask bits are read once per sequence. Blocks meet at every step, where they exchange the
// state through global memory, so all must run at once (a cooperative launch).
//
// The input's part of the gates comes in as `gates`: it is one large product for all steps.
#pragma once

#include "../common/philox.h"
#include "device.cuh"
#include "masked_rnn.h"

namespace modmask::cuda {

constexpr int kRnnThreads = 256;
constexpr int kRnnRows = 4;     // sequences that a thread works on at once
constexpr int kRnnOutputs = 4;  // at most: gates of a unit, or units

MODMASK_HOST_DEVICE int rnn_step_of_row(int depth) {
  return depth + 4;  // rows start at different banks, and on 16 bytes
}

MODMASK_HOST_DEVICE int rnn_depth(int n) {
  return (n + 3) / 4 * 4;
}

// Bytes of shared memory: the weights, the sequences' vectors, the state of the block's units.
template <Cell kCell>
inline size_t rnn_shared_bytes(const RnnSizes& s, bool backward) {
  const size_t gates = kGateCount<kCell>;
  const size_t outputs = backward ? s.units : gates * s.units;
  const size_t depth =
      backward ? rnn_depth(static_cast<int>(gates * s.hidden)) : rnn_depth(s.hidden);
  const size_t states = (backward ? 2 : 1) * static_cast<size_t>(s.rows) * s.units;
  return sizeof(float) *
         ((outputs + s.chunk_rows) * rnn_step_of_row(static_cast<int>(depth)) + states);
}

// Units per block and sequences at once such that all blocks run at the same time and what they
// keep fits; units = 0 where nothing does. `most_shared` per block; one block per multiprocessor.
template <Cell kCell>
inline RnnSizes plan_rnn(
    int steps, int rows, int groups, int hidden, int multiprocessors, size_t most_shared) {
  RnnSizes s{steps, rows, groups, hidden, 0, 0};
  for (int units = kRnnOutputs; units <= (hidden + 3) / 4 * 4; units += kRnnOutputs) {
    const int64_t blocks = static_cast<int64_t>(groups) * ((hidden + units - 1) / units);
    if (blocks > multiprocessors) {
      continue;
    }
    s.units = units;
    for (s.chunk_rows = (rows + 3) / 4 * 4; s.chunk_rows > 0; s.chunk_rows -= kRnnRows) {
      if (rnn_shared_bytes<kCell>(s, false) <= most_shared &&
          rnn_shared_bytes<kCell>(s, true) <= most_shared) {
        return s;
      }
    }
  }
  s.units = 0;
  return s;
}

template <Cell kCell>
inline LaunchShape rnn_shape(const RnnSizes& s, bool backward) {
  const unsigned slices = static_cast<unsigned>((s.hidden + s.units - 1) / s.units);
  return {
      dim3(slices, static_cast<unsigned>(s.groups)), dim3(kRnnThreads),
      rnn_shared_bytes<kCell>(s, backward)};
}

MODMASK_DEVICE float sigmoid(float v) {
  return 1.0f / (1.0f + expf(-v));
}

// The masked weight for a group, by its row-major index.
MODMASK_DEVICE float masked_weight(const RnnMask& m, int group, int64_t element) {
  const float w = load(m.weight + element);
  if (m.bits == nullptr) {
    return w;
  }
  const uint8_t* bits =
      m.bits + group / m.samples * m.set_stride + group % m.samples * m.sample_stride;
  return (load(bits + (element >> 3)) >> (element & 7) & 1) != 0 ? w : 0.0f;
}

// Copies `count` values of a row that other blocks wrote, and zeros up to `depth`, to shared
// memory; a warp's work. A null row is all zeros.
MODMASK_DEVICE void fetch_row(const float* row, int count, int depth, SharedPointer<float> to) {
  const bool whole = count % 4 == 0;  // as all rows of the matrix: on 16 bytes
  for (int j = static_cast<int>(threadIdx.x) % 32 * 4; j < depth; j += 128) {
    Vector<float, 4> v{};
    if (row != nullptr && whole) {
      v = load_coherent_vector<4>(row + j);
    } else if (row != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v.v[i] = j + i < count ? load_coherent(row + j + i) : 0.0f;
      }
    }
    store_vector<4>(to + j, v);
  }
}

// What a thread does of all products of kRnnRows sequences with kOutputs rows of weights: `parts`
// neighbouring lanes share one item, each takes every parts-th four columns.
struct RnnItems {
  int parts;
  int part;
  int first;
  int stride;
  int count;   // of items
  int passes;  // the same for all threads

  MODMASK_DEVICE RnnItems(int items) : count(items) {
    parts = 1;
    while (parts < 32 && 2 * parts * items <= kRnnThreads) {
      parts *= 2;
    }
    part = static_cast<int>(threadIdx.x) % parts;
    first = static_cast<int>(threadIdx.x) / parts;
    stride = kRnnThreads / parts;
    passes = (items + stride - 1) / stride;
  }
};

// sums[r][o] = rows[r] . weights[o], in all lanes of an item; both in shared memory.
template <int kOutputs>
MODMASK_DEVICE void multiply_rows(
    const RnnItems& items,
    SharedPointer<float> vectors,
    SharedPointer<float> weights,
    int output_step,
    int depth,
    float (&sums)[kRnnRows][kRnnOutputs]) {
  const int step = rnn_step_of_row(depth);
#pragma unroll
  for (int r = 0; r < kRnnRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      sums[r][o] = 0.0f;
    }
  }
  for (int j = items.part * 4; j < depth; j += items.parts * 4) {
    Vector<float, 4> w[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = load_vector<4>(weights + (o * output_step * step + j));
    }
#pragma unroll
    for (int r = 0; r < kRnnRows; ++r) {
      const Vector<float, 4> v = load_vector<4>(vectors + (r * step + j));
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r][o] = fmaf(v.v[i], w[o].v[i], sums[r][o]);
        }
      }
    }
  }
  for (int by = items.parts / 2; by > 0; by /= 2) {
#pragma unroll
    for (int r = 0; r < kRnnRows; ++r) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        sums[r][o] += __shfl_xor_sync(kAllLanes, sums[r][o], by);
      }
    }
  }
}

// ---- the cell of one unit and sequence

struct RnnStep {
  float h;
  float state;  // c of an LSTM, h of a GRU
  float saved[kSavedValues];
};

// `input` and `hidden`: the two parts of the gates.
template <Cell kCell>
MODMASK_DEVICE RnnStep
step_cell(const float (&input)[4], const float (&hidden)[kRnnOutputs], float state) {
  RnnStep s;
  if constexpr (kCell == Cell::kLstm) {
    const float i = sigmoid(input[0] + hidden[0]), f = sigmoid(input[1] + hidden[1]);
    const float g = tanhf(input[2] + hidden[2]), o = sigmoid(input[3] + hidden[3]);
    s.state = f * state + i * g;
    s.h = o * tanhf(s.state);
    s.saved[0] = i;
    s.saved[1] = f;
    s.saved[2] = g;
    s.saved[3] = o;
  } else {
    const float r = sigmoid(input[0] + hidden[0]), z = sigmoid(input[1] + hidden[1]);
    const float n = tanhf(input[2] + r * hidden[2]);
    s.h = n + z * (state - n);
    s.state = s.h;
    s.saved[0] = r;
    s.saved[1] = z;
    s.saved[2] = n;
    s.saved[3] = hidden[2];
  }
  s.saved[4] = state;
  return s;
}

struct RnnGradients {
  float dgates[kGateGradients];
  float dstate;  // of c, or what reaches h past the product
};

// From the gradients of h and, of an LSTM, of c after the step.
template <Cell kCell>
MODMASK_DEVICE RnnGradients
step_cell_backward(const float (&saved)[kSavedValues], float dh, float dc) {
  RnnGradients d;
  const float before = saved[4];
  if constexpr (kCell == Cell::kLstm) {
    const float i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const float tanh_c = tanhf(f * before + i * g);
    const float grad = dc + dh * o * (1.0f - tanh_c * tanh_c);
    d.dgates[0] = grad * g * i * (1.0f - i);
    d.dgates[1] = grad * before * f * (1.0f - f);
    d.dgates[2] = grad * i * (1.0f - g * g);
    d.dgates[3] = dh * tanh_c * o * (1.0f - o);
    d.dstate = grad * f;
  } else {
    const float r = saved[0], z = saved[1], n = saved[2], hidden_n = saved[3];
    const float dn = dh * (1.0f - z) * (1.0f - n * n);
    d.dgates[0] = dn * hidden_n * r * (1.0f - r);
    d.dgates[1] = dh * (before - n) * z * (1.0f - z);
    d.dgates[2] = dn * r;
    d.dgates[3] = dn;
    d.dstate = dh * z;
  }
  return d;
}

// ---- forward

template <Cell kCell>
__global__ void __launch_bounds__(kRnnThreads, 1) rnn_forward(RnnForward p) {
  constexpr int kGates = kGateCount<kCell>;
  const RnnSizes& s = p.size;
  const int depth = rnn_depth(s.hidden), step_of_row = rnn_step_of_row(depth);
  const int group = static_cast<int>(blockIdx.y), u0 = static_cast<int>(blockIdx.x) * s.units;
  const int units = s.hidden - u0 < s.units ? s.hidden - u0 : s.units;
  const int64_t batch = static_cast<int64_t>(s.rows) * s.groups;
  const int64_t row0 = static_cast<int64_t>(group) * s.rows;
  const int thread = static_cast<int>(threadIdx.x);

  MODMASK_DYNAMIC_SHARED(memory);
  const SharedPointer<float> weights = shared_cast<float>(memory);  // [gate][unit][depth]
  const SharedPointer<float> vectors = weights + kGates * s.units * step_of_row;
  const SharedPointer<float> states = vectors + s.chunk_rows * step_of_row;  // [row][unit]

  for (int at = thread; at < kGates * s.units * depth; at += kRnnThreads) {
    const int j = at % depth, unit = at / depth % s.units, gate = at / depth / s.units;
    const bool inside = j < s.hidden && unit < units;
    const int64_t row = static_cast<int64_t>(gate) * s.hidden + u0 + unit;
    weights[(gate * s.units + unit) * step_of_row + j] =
        inside ? masked_weight(p.mask, group, row * s.hidden + j) : 0.0f;
  }
  const float* start = kCell == Cell::kLstm ? p.c0 : p.h0;
  for (int at = thread; at < s.rows * units; at += kRnnThreads) {
    const int64_t row = row0 + at / units;
    const int unit = at % units;
    states[at / units * s.units + unit] =
        start != nullptr ? load(start + row * s.hidden + u0 + unit) : 0.0f;
  }

  for (int turn = 0; turn < s.steps; ++turn) {
    const int t = p.reverse ? s.steps - 1 - turn : turn;
    const float* before = turn == 0 ? p.h0 : p.h + (turn - 1) % 2 * batch * s.hidden;
    float* after = p.h + turn % 2 * batch * s.hidden;
    for (int r0 = 0; r0 < s.rows; r0 += s.chunk_rows) {
      const int rows = s.rows - r0 < s.chunk_rows ? s.rows - r0 : s.chunk_rows;
      __syncthreads();
      for (int r = thread / 32; r < s.chunk_rows; r += kRnnThreads / 32) {
        const bool inside = r < rows && before != nullptr;
        fetch_row(
            inside ? before + (row0 + r0 + r) * s.hidden : nullptr, s.hidden, depth,
            vectors + r * step_of_row);
      }
      __syncthreads();
      const int quads = (rows + kRnnRows - 1) / kRnnRows;
      const RnnItems items(units * quads);
      for (int pass = 0; pass < items.passes; ++pass) {
        const int item = items.first + pass * items.stride;
        const int mine = item < items.count ? item : 0;
        const int unit = mine % units, first = mine / units * kRnnRows;
        float sums[kRnnRows][kRnnOutputs];
        multiply_rows<kGates>(
            items, vectors + first * step_of_row, weights + unit * step_of_row, s.units, depth,
            sums);
#pragma unroll
        for (int m = 0; m < kRnnRows; ++m) {
          const int r = r0 + first + m;
          if (m % items.parts != items.part || item >= items.count || r >= s.rows) {
            continue;
          }
          const int64_t row = row0 + r, at = (t * batch + row) * s.hidden + u0 + unit;
          const float held = states[r * s.units + unit];
          const float* gates = p.gates + (t * batch + row) * kGates * s.hidden + u0 + unit;
          float input[4];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            input[gate] = load(gates + gate * s.hidden);
            if (p.hidden_bias != nullptr) {
              sums[m][gate] += load(
                  p.hidden_bias + (static_cast<int64_t>(group) * kGates + gate) * s.hidden + u0 +
                  unit);
            }
          }
          const RnnStep result = step_cell<kCell>(input, sums[m], held);
          const bool runs = p.lengths == nullptr || t < load(p.lengths + row);
          if (p.saved != nullptr) {
            float* saved = p.saved + (t * batch + row) * kSavedValues * s.hidden + u0 + unit;
#pragma unroll
            for (int i = 0; i < kSavedValues; ++i) {
              store(saved + i * s.hidden, result.saved[i]);
            }
          }
          store(p.y + at, runs ? result.h : 0.0f);
          const int64_t place = row * s.hidden + u0 + unit;
          float h = result.h;
          if (runs) {
            states[r * s.units + unit] = result.state;
          } else {
            h = before != nullptr ? load_coherent(before + place) : 0.0f;
          }
          store(after + place, h);
        }
      }
    }
    if (turn + 1 < s.steps) {
      grid_barrier(p.arrivals);
    }
  }
  __syncthreads();
  for (int at = thread; at < s.rows * units; at += kRnnThreads) {
    const int r = at / units, unit = at % units;
    const int64_t place = (row0 + r) * s.hidden + u0 + unit;
    const float* last = s.steps == 0 ? p.h0 : p.h + (s.steps - 1) % 2 * batch * s.hidden;
    store(p.h_n + place, last != nullptr ? load_coherent(last + place) : 0.0f);
    if (kCell == Cell::kLstm) {
      store(p.c_n + place, static_cast<float>(states[r * s.units + unit]));
    }
  }
}

// ---- backward

// The gradient of h before a step: that of the gates' recurrent part times the masked weight.
template <Cell kCell>
__global__ void __launch_bounds__(kRnnThreads, 1) rnn_backward(RnnBackward p) {
  constexpr int kGates = kGateCount<kCell>;
  const RnnSizes& s = p.size;
  const int depth = rnn_depth(kGates * s.hidden), step_of_row = rnn_step_of_row(depth);
  const int group = static_cast<int>(blockIdx.y), u0 = static_cast<int>(blockIdx.x) * s.units;
  const int units = s.hidden - u0 < s.units ? s.hidden - u0 : s.units;
  const int64_t batch = static_cast<int64_t>(s.rows) * s.groups;
  const int64_t row0 = static_cast<int64_t>(group) * s.rows;
  const int thread = static_cast<int>(threadIdx.x);

  MODMASK_DYNAMIC_SHARED(memory);
  const SharedPointer<float> weights = shared_cast<float>(memory);  // [unit][gate, row]
  const SharedPointer<float> vectors = weights + s.units * step_of_row;
  const SharedPointer<float> dh = vectors + s.chunk_rows * step_of_row;  // [row][unit]
  const SharedPointer<float> dc = dh + s.rows * s.units;

  for (int at = thread; at < s.units * depth; at += kRnnThreads) {
    const int unit = at % s.units, k = at / s.units;  // along a row of the weight
    const bool inside = k < kGates * s.hidden && unit < units;
    weights[unit * step_of_row + k] =
        inside ? masked_weight(p.mask, group, static_cast<int64_t>(k) * s.hidden + u0 + unit)
               : 0.0f;
  }
  for (int at = thread; at < s.rows * units; at += kRnnThreads) {
    const int r = at / units, unit = at % units;
    const int64_t place = (row0 + r) * s.hidden + u0 + unit;
    dh[r * s.units + unit] = p.dh_n != nullptr ? load(p.dh_n + place) : 0.0f;
    dc[r * s.units + unit] = p.dc_n != nullptr ? load(p.dc_n + place) : 0.0f;
  }

  // one turn more than steps: the product of the last one
  for (int turn = 0; turn <= s.steps; ++turn) {
    const int t = p.reverse ? turn : s.steps - 1 - turn;
    const int after = p.reverse ? t - 1 : t + 1;
    if (turn > 0) {
      grid_barrier(p.arrivals);
    }
    for (int r0 = 0; turn > 0 && r0 < s.rows; r0 += s.chunk_rows) {
      const int rows = s.rows - r0 < s.chunk_rows ? s.rows - r0 : s.chunk_rows;
      __syncthreads();
      for (int r = thread / 32; r < s.chunk_rows; r += kRnnThreads / 32) {
        const float* row =
            r < rows ? p.dgates + (after * batch + row0 + r0 + r) * kGateGradients * s.hidden
                     : nullptr;
        fetch_row(row, kGates * s.hidden, depth, vectors + r * step_of_row);
      }
      __syncthreads();
      const int quads = (rows + kRnnRows - 1) / kRnnRows;
      const int unit_quads = (units + kRnnOutputs - 1) / kRnnOutputs;
      const RnnItems items(unit_quads * quads);
      for (int pass = 0; pass < items.passes; ++pass) {
        const int item = items.first + pass * items.stride;
        const int mine = item < items.count ? item : 0;
        const int unit = mine % unit_quads * kRnnOutputs, first = mine / unit_quads * kRnnRows;
        float sums[kRnnRows][kRnnOutputs];
        multiply_rows<kRnnOutputs>(
            items, vectors + first * step_of_row, weights + unit * step_of_row, 1, depth, sums);
#pragma unroll
        for (int m = 0; m < kRnnRows; ++m) {
          const int r = r0 + first + m;
          if (m % items.parts != items.part || item >= items.count || r >= s.rows) {
            continue;
          }
#pragma unroll
          for (int o = 0; o < kRnnOutputs; ++o) {
            if (unit + o < units) {
              dh[r * s.units + unit + o] += sums[m][o];
            }
          }
        }
      }
    }
    __syncthreads();
    for (int at = thread; at < s.rows * units; at += kRnnThreads) {
      const int r = at / units, unit = at % units, state = r * s.units + unit;
      const int64_t row = row0 + r;
      if (turn == s.steps) {
        store(p.dh0 + row * s.hidden + u0 + unit, static_cast<float>(dh[state]));
        if (kCell == Cell::kLstm) {
          store(p.dc0 + row * s.hidden + u0 + unit, static_cast<float>(dc[state]));
        }
        continue;
      }
      const bool runs = p.lengths == nullptr || t < load(p.lengths + row);
      RnnGradients d{};
      if (runs) {
        const int64_t where = t * batch + row;
        float saved[kSavedValues];
#pragma unroll
        for (int i = 0; i < kSavedValues; ++i) {
          saved[i] = load(p.saved + (where * kSavedValues + i) * s.hidden + u0 + unit);
        }
        const float above = p.dy != nullptr ? load(p.dy + where * s.hidden + u0 + unit) : 0.0f;
        d = step_cell_backward<kCell>(saved, dh[state] + above, dc[state]);
        // what reaches the state before: of an LSTM c by itself and h through the gates only
        if (kCell == Cell::kLstm) {
          dc[state] = d.dstate;
          dh[state] = 0.0f;
        } else {
          dh[state] = d.dstate;
        }
      }
#pragma unroll
      for (int i = 0; i < kGateGradients; ++i) {
        store(
            p.dgates + ((t * batch + row) * kGateGradients + i) * s.hidden + u0 + unit,
            d.dgates[i]);
      }
    }
  }
}

}  // namespace modmask::cuda
