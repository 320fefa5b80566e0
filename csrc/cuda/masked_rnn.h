// What the kernels of masked recurrent layers are given; neither torch nor CUDA.
#pragma once

#include <cstdint>

#include "masked_linear.h"

namespace modmask::cuda {

enum class Cell { kLstm, kGru };

template <Cell kCell>
constexpr int kGateCount = kCell == Cell::kLstm ? 4 : 3;

// Values per unit, sequence and step that the backward pass needs: the activations of the gates
// i, f, g, o and the cell state before the step; r, z, n, the recurrent part of n and the state
// before the step.
constexpr int kSavedValues = 5;
// Gradients per unit, sequence and step, first those that the recurrent weight multiplied: i, f, g,
// o; r, z, the recurrent part of n, n.
constexpr int kGateGradients = 4;

// Sequences of group g are rows [g * rows, (g + 1) * rows) of the batch; g = set * samples +
// sample.
struct RnnMask {
  const float* weight;    // [gates * hidden, hidden]
  const uint8_t* bits;    // 1 bit per weight and group; null: the whole weight
  int64_t set_stride;     // in bytes, between the bits of two sets
  int64_t sample_stride;  // and of two samples
  int samples;
};

struct RnnSizes {
  int steps;
  int rows;  // per group
  int groups;
  int hidden;
  int units;       // per block
  int chunk_rows;  // sequences in shared memory at once
};

struct RnnForward {
  RnnSizes size;
  RnnMask mask;
  const float* gates;        // [steps, batch, gates * hidden], of the input with its bias
  const float* hidden_bias;  // [groups, gates * hidden] or null
  const float* h0;           // [batch, hidden] or null: zeros
  const float* c0;
  const int64_t* lengths;  // [batch] or null: all steps
  bool reverse;
  float* y;            // [steps, batch, hidden]
  float* h;            // [2, batch, hidden], scratch: the state after even and odd steps
  float* h_n;          // [batch, hidden]
  float* c_n;          // of an LSTM
  float* saved;        // [steps, batch, kSavedValues, hidden] or null
  uint32_t* arrivals;  // one word, zero
};

struct RnnBackward {
  RnnSizes size;
  RnnMask mask;
  const float* saved;
  const float* dy;    // [steps, batch, hidden] or null: zeros
  const float* dh_n;  // [batch, hidden] or null
  const float* dc_n;
  const int64_t* lengths;
  bool reverse;
  float* dgates;  // [steps, batch, kGateGradients, hidden]
  float* dh0;     // [batch, hidden]
  float* dc0;     // of an LSTM
  uint32_t* arrivals;
};

// Of a loop that is cut into steps.
struct RnnSteps {
  int64_t steps;
  int64_t rows;  // per group
  int64_t groups;
  int64_t hidden;

  MODMASK_HOST_DEVICE int64_t batch() const {
    return rows * groups;
  }
};

// What the loops are given: as the kernels for all steps at once, and the product at each.
struct RnnStepsForward {
  RnnSteps size;
  float* parts;        // of the product, filled at every step
  const float* gates;  // [steps, batch, gates * hidden]
  const float* hidden_bias;
  const int64_t* lengths;
  bool started;  // whether the first state may be other than 0
  bool reverse;
  float* y;
  float* saved;
  float* h_n;  // the first state, then the last
  float* c_n;
};

struct RnnStepsBackward {
  RnnSteps size;
  float* parts;
  const float* saved;
  const float* dy;  // or null
  const int64_t* lengths;
  bool reverse;
  float* dgates;
  float* recurrent;
  float* dh0;  // of the last state, then of the first
  float* dc0;
};

// The layer of the product: `bits` as RnnMask has them, one mask for every group.
inline MaskedLinear rnn_layer(const RnnSteps& s, const RnnMask& m, int gates) {
  MaskedLinear l{};
  l.type = ElementType::kFloat32;
  l.mask.samples = m.samples;
  l.mask.sets = s.groups / m.samples;
  l.hard = true;
  l.rows = s.rows;
  l.in = s.hidden;
  l.out = gates * s.hidden;
  l.weight = m.weight;
  l.packed = {const_cast<uint8_t*>(m.bits), m.set_stride, m.sample_stride};
  return l;
}

}  // namespace modmask::cuda
