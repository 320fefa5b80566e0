// What the kernels of masked recurrent layers are given; neither torch nor CUDA.
#pragma once

#include <cstdint>

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

}  // namespace modmask::cuda
