#include <climits>

#include "launch.cuh"
#include "masked_rnn.cuh"
#include "rnn_cell.cuh"

namespace modmask::cuda {

RnnSizes plan_rnn_here(Cell cell, int64_t steps, int64_t rows, int64_t groups, int64_t hidden) {
  const int64_t most = INT_MAX / (4 * kGateGradients);
  if (steps > most || rows > most || groups > most || hidden > most || rows * groups > most) {
    return {};
  }
  int device = 0, multiprocessors = 0, most_shared = 0, cooperative = 0;
  const auto known = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  if (cudaGetDevice(&device) != cudaSuccess ||
      !known(&multiprocessors, cudaDevAttrMultiProcessorCount) ||
      !known(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
      !known(&cooperative, cudaDevAttrCooperativeLaunch)) {
    return {};
  }
  const auto plan = cell == Cell::kLstm ? plan_rnn<Cell::kLstm> : plan_rnn<Cell::kGru>;
  return plan(
      static_cast<int>(steps), static_cast<int>(rows), static_cast<int>(groups),
      static_cast<int>(hidden), cooperative != 0 ? multiprocessors : 0,
      static_cast<size_t>(most_shared));
}

void launch_rnn_forward(Cell cell, const RnnForward& p, Stream stream) {
  if (cell == Cell::kLstm) {
    const LaunchShape shape = rnn_shape<Cell::kLstm>(p.size, false);
    launch("rnn_forward<lstm>", rnn_forward<Cell::kLstm>, shape, p, stream, true);
  } else {
    const LaunchShape shape = rnn_shape<Cell::kGru>(p.size, false);
    launch("rnn_forward<gru>", rnn_forward<Cell::kGru>, shape, p, stream, true);
  }
}

void launch_rnn_backward(Cell cell, const RnnBackward& p, Stream stream) {
  if (cell == Cell::kLstm) {
    const LaunchShape shape = rnn_shape<Cell::kLstm>(p.size, true);
    launch("rnn_backward<lstm>", rnn_backward<Cell::kLstm>, shape, p, stream, true);
  } else {
    const LaunchShape shape = rnn_shape<Cell::kGru>(p.size, true);
    launch("rnn_backward<gru>", rnn_backward<Cell::kGru>, shape, p, stream, true);
  }
}

namespace {

template <Cell kCell>
void steps_forward(const RnnStepsForward& p, const MaskedLinear& layer, Stream stream) {
  rnn_steps_forward<kCell>(
      p,
      [&](const float* state) {
        return launch_masked_linear_parts(layer, false, state, p.parts, stream);
      },
      [&](const RnnCellForward& cell) {
        launch("rnn_cell_forward", rnn_cell_forward<kCell>, rnn_cell_shape(p.size), cell, stream);
      });
}

template <Cell kCell>
void steps_backward(const RnnStepsBackward& p, const MaskedLinear& layer, Stream stream) {
  rnn_steps_backward<kCell>(
      p,
      [&](const float* dgates) {
        return launch_masked_linear_parts(layer, true, dgates, p.parts, stream);
      },
      [&](const RnnCellBackward& cell) {
        launch("rnn_cell_backward", rnn_cell_backward<kCell>, rnn_cell_shape(p.size), cell, stream);
      });
}

}  // namespace

void launch_rnn_steps_forward(
    Cell cell, const RnnStepsForward& p, const MaskedLinear& layer, Stream stream) {
  cell == Cell::kLstm ? steps_forward<Cell::kLstm>(p, layer, stream)
                      : steps_forward<Cell::kGru>(p, layer, stream);
}

void launch_rnn_steps_backward(
    Cell cell, const RnnStepsBackward& p, const MaskedLinear& layer, Stream stream) {
  cell == Cell::kLstm ? steps_backward<Cell::kLstm>(p, layer, stream)
                      : steps_backward<Cell::kGru>(p, layer, stream);
}

}  // namespace modmask::cuda
