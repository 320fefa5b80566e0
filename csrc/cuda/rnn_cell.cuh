// The time loop of a masked LSTM or GRU step by step, for recurrent weights that do not stay on the
// chip: at every step a product with the masked weight (masked_linear.cuh) and one kernel for the
// cell, which adds up the parts of the product. States stand in h_n and c_n from step to step,
// their gradients in dh0 and dc0.
#pragma once

#include "mask.cuh"
#include "masked_rnn.cuh"

namespace modmask::cuda {

constexpr int kCellThreads = 256;
constexpr int kCellUnits = 4;  // of a thread

// The product at a step: its parts are added up in their order. None at the first step.
struct RnnProduct {
  const float* parts;  // [splits, batch, columns]
  int64_t splits;
};

struct RnnCellForward {
  RnnSteps size;
  RnnProduct product;        // of the state, gates * hidden columns
  const float* gates;        // of this step, as all that has steps: [batch, gates * hidden]
  const float* hidden_bias;  // [groups, gates * hidden] or null
  const int64_t* lengths;    // [batch] or null
  int64_t step;
  float* y;      // [batch, hidden]
  float* saved;  // [batch, kSavedValues, hidden]
  float* h;      // [batch, hidden], of the step before, then of this one
  float* c;      // of an LSTM
};

struct RnnCellBackward {
  RnnSteps size;
  RnnProduct product;  // of the gradients of the gates, hidden columns: belongs to h
  const float* saved;  // of this step; null: only the product is added
  const float* dy;     // [batch, hidden] or null
  const int64_t* lengths;
  int64_t step;
  float* dgates;     // [batch, kGateGradients, hidden]
  float* recurrent;  // of a GRU, those of them that the weight multiplied: [batch, gates * hidden]
  float* dh;         // [batch, hidden], of the state after the step, then of that before
  float* dc;
};

inline LaunchShape rnn_cell_shape(const RnnSteps& s) {
  const int64_t of_row = (s.hidden + kCellUnits - 1) / kCellUnits;
  const int64_t blocks = (s.batch() * of_row + kCellThreads - 1) / kCellThreads;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kCellThreads)};
}

// Which units of which sequence a thread has; `left` from there to the end of the row.
struct CellPlace {
  int64_t row;
  int64_t unit;
  int64_t left;

  MODMASK_DEVICE explicit CellPlace(const RnnSteps& s) {
    const int64_t of_row = (s.hidden + kCellUnits - 1) / kCellUnits;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
    row = at / of_row;
    unit = (at - row * of_row) * kCellUnits;
    left = row < s.rows * s.groups ? s.hidden - unit : 0;
  }
};

MODMASK_DEVICE void add_product(
    const RnnProduct& p, int64_t count, int64_t at, int64_t left, float (&to)[kCellUnits]) {
  for (int64_t s = 0; s < p.splits; ++s) {
    float part[kCellUnits];
    load_part(p.parts + s * count + at, left, part);
#pragma unroll
    for (int j = 0; j < kCellUnits; ++j) {
      to[j] += part[j];
    }
  }
}

template <Cell kCell>
__global__ void __launch_bounds__(kCellThreads) rnn_cell_forward(RnnCellForward p) {
  constexpr int kGates = kGateCount<kCell>;
  const CellPlace place(p.size);
  if (place.left <= 0) {
    return;
  }
  const int64_t hidden = p.size.hidden, width = kGates * hidden;
  const int64_t at = place.row * hidden + place.unit;
  float input[kGates][kCellUnits], recurrent[kGates][kCellUnits];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t column = gate * hidden + place.unit;
    load_part(p.gates + place.row * width + column, place.left, input[gate]);
    if (p.hidden_bias != nullptr) {
      const int64_t group = place.row / p.size.rows;
      load_part(p.hidden_bias + group * width + column, place.left, recurrent[gate]);
    } else {
#pragma unroll
      for (int j = 0; j < kCellUnits; ++j) {
        recurrent[gate][j] = 0.0f;
      }
    }
    add_product(
        p.product, p.size.batch() * width, place.row * width + column, place.left, recurrent[gate]);
  }
  float h[kCellUnits], state[kCellUnits], y[kCellUnits], saved[kSavedValues][kCellUnits];
  load_part(p.h + at, place.left, h);
  load_part(kCell == Cell::kLstm ? p.c + at : p.h + at, place.left, state);
  const bool runs = p.lengths == nullptr || p.step < load(p.lengths + place.row);
#pragma unroll
  for (int j = 0; j < kCellUnits; ++j) {
    float of_input[4], of_state[kRnnOutputs];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      of_input[gate] = input[gate][j];
      of_state[gate] = recurrent[gate][j];
    }
    const RnnStep result = step_cell<kCell>(of_input, of_state, state[j]);
#pragma unroll
    for (int i = 0; i < kSavedValues; ++i) {
      saved[i][j] = result.saved[i];
    }
    y[j] = runs ? result.h : 0.0f;
    h[j] = runs ? result.h : h[j];
    state[j] = runs ? result.state : state[j];
  }
  store_part(p.y + at, place.left, y);
  store_part(p.h + at, place.left, h);
  if (kCell == Cell::kLstm) {
    store_part(p.c + at, place.left, state);
  }
#pragma unroll
  for (int i = 0; i < kSavedValues; ++i) {
    store_part(
        p.saved + (place.row * kSavedValues + i) * hidden + place.unit, place.left, saved[i]);
  }
}

template <Cell kCell>
__global__ void __launch_bounds__(kCellThreads) rnn_cell_backward(RnnCellBackward p) {
  constexpr int kGates = kGateCount<kCell>;
  const CellPlace place(p.size);
  if (place.left <= 0) {
    return;
  }
  const int64_t hidden = p.size.hidden, at = place.row * hidden + place.unit;
  float dh[kCellUnits], dc[kCellUnits] = {};
  load_part(p.dh + at, place.left, dh);
  add_product(p.product, p.size.batch() * hidden, at, place.left, dh);
  const bool runs =
      p.saved != nullptr && (p.lengths == nullptr || p.step < load(p.lengths + place.row));
  float dgates[kGateGradients][kCellUnits] = {};
  if (runs) {
    float saved[kSavedValues][kCellUnits], dy[kCellUnits] = {};
#pragma unroll
    for (int i = 0; i < kSavedValues; ++i) {
      load_part(
          p.saved + (place.row * kSavedValues + i) * hidden + place.unit, place.left, saved[i]);
    }
    if (p.dy != nullptr) {
      load_part(p.dy + at, place.left, dy);
    }
    if (kCell == Cell::kLstm) {
      load_part(p.dc + at, place.left, dc);
    }
#pragma unroll
    for (int j = 0; j < kCellUnits; ++j) {
      float of_unit[kSavedValues];
#pragma unroll
      for (int i = 0; i < kSavedValues; ++i) {
        of_unit[i] = saved[i][j];
      }
      const RnnGradients d = step_cell_backward<kCell>(of_unit, dh[j] + dy[j], dc[j]);
#pragma unroll
      for (int i = 0; i < kGateGradients; ++i) {
        dgates[i][j] = d.dgates[i];
      }
      // what reaches the state before: of an LSTM c by itself and h through the gates only
      dh[j] = kCell == Cell::kLstm ? 0.0f : d.dstate;
      dc[j] = d.dstate;
    }
    if (kCell == Cell::kLstm) {
      store_part(p.dc + at, place.left, dc);
    }
  }
  store_part(p.dh + at, place.left, dh);
  if (p.saved == nullptr) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kGateGradients; ++i) {
    store_part(
        p.dgates + (place.row * kGateGradients + i) * hidden + place.unit, place.left, dgates[i]);
    if (kCell == Cell::kGru && i < kGates) {
      store_part(
          p.recurrent + (place.row * kGates + i) * hidden + place.unit, place.left, dgates[i]);
    }
  }
}

// product(state) fills the parts and returns how many there are; step(cell) runs the cell.
template <Cell kCell, typename Product, typename Step>
void rnn_steps_forward(const RnnStepsForward& p, const Product& product, const Step& step) {
  const int64_t of_step = p.size.batch() * p.size.hidden;
  for (int64_t turn = 0; turn < p.size.steps; ++turn) {
    const int64_t t = p.reverse ? p.size.steps - 1 - turn : turn;
    const int64_t splits = turn > 0 || p.started ? product(p.h_n) : 0;
    step(
        RnnCellForward{
            p.size,
            {p.parts, splits},
            p.gates + t * of_step * kGateCount<kCell>,
            p.hidden_bias,
            p.lengths,
            t,
            p.y + t * of_step,
            p.saved + t * of_step * kSavedValues,
            p.h_n,
            p.c_n});
  }
}

template <Cell kCell, typename Product, typename Step>
void rnn_steps_backward(const RnnStepsBackward& p, const Product& product, const Step& step) {
  const int64_t of_step = p.size.batch() * p.size.hidden;
  for (int64_t turn = 0; turn <= p.size.steps; ++turn) {
    const int64_t t = p.reverse ? turn : p.size.steps - 1 - turn;
    const int64_t after = p.reverse ? t - 1 : t + 1;
    const float* gradients =
        kCell == Cell::kLstm ? p.dgates + after * of_step * kGateGradients : p.recurrent;
    const int64_t splits = turn > 0 ? product(gradients) : 0;
    const bool last = turn == p.size.steps;  // one turn more: the product of the last step
    step(
        RnnCellBackward{
            p.size,
            {p.parts, splits},
            last ? nullptr : p.saved + t * of_step * kSavedValues,
            last || p.dy == nullptr ? nullptr : p.dy + t * of_step,
            p.lengths,
            t,
            last ? nullptr : p.dgates + t * of_step * kGateGradients,
            p.recurrent,
            p.dh0,
            p.dc0});
  }
}

}  // namespace modmask::cuda
