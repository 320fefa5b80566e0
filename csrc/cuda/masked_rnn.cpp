// modmask::rnn_loop and its gradient. The schemas live in Python.

#include <tuple>

#include "bindings.h"

namespace modmask::cuda {

namespace {

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

float* data(const Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

Tensor zero_word(const Tensor& like) {
  return torch::stable::new_zeros(like, {1}, ScalarType::Int);
}

uint32_t* word(const Tensor& t) {
  return static_cast<uint32_t*>(t.mutable_data_ptr());
}

// The masked weight and the sizes, which must fit one launch on the current device.
struct Loop {
  const Cell cell;
  const Operand weight_data;
  const Operand bits_data;
  const int64_t hidden;
  RnnSizes sizes;
  RnnMask mask{};

  Loop(
      const Place& place,
      const Tensor& weight,
      const std::optional<Tensor>& bits,
      int64_t cell_number,
      int64_t steps,
      int64_t batch,
      int64_t groups,
      int64_t samples)
      : cell(static_cast<Cell>(cell_number)),
        weight_data(place, weight, "weight"),
        bits_data(place, bits, "bits"),
        hidden(weight.size(1)),
        sizes(plan_rnn_here(cell, steps, batch / groups, groups, hidden)) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32");
    STD_TORCH_CHECK(batch % groups == 0, "groups must divide the batch, ", batch);
    STD_TORCH_CHECK(sizes.units > 0, "the time loop does not fit this device");
    mask.weight = weight_data.data<float>();
    mask.samples = static_cast<int>(samples);
    if (bits.has_value()) {
      STD_TORCH_CHECK(bits->scalar_type() == ScalarType::Byte, "bits must be uint8");
      STD_TORCH_CHECK(
          bits->dim() == 3 && bits->size(0) == samples && bits->size(0) * bits->size(1) == groups &&
              bits->size(2) == (weight.size(0) * hidden + 7) / 8,
          "bits must have shape [samples, sets, bytes of the weight]");
      mask.bits = bits_data.data<uint8_t>();
      mask.set_stride = bits->size(2);
      mask.sample_stride = bits->size(1) * bits->size(2);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> loop(
    Tensor gates,
    Tensor weight,
    std::optional<Tensor> bits,
    std::optional<Tensor> hidden_bias,
    std::optional<Tensor> h0,
    std::optional<Tensor> c0,
    std::optional<Tensor> lengths,
    int64_t cell,
    bool reverse,
    int64_t groups,
    int64_t samples) {
  const Place place(gates);
  const int64_t steps = gates.size(0), batch = gates.size(1);
  const Loop l(place, weight, bits, cell, steps, batch, groups, samples);
  STD_TORCH_CHECK(gates.size(2) == weight.size(0), "gates must be as wide as weight is high");
  const Operand gates_data(place, gates, "gates"), bias_data(place, hidden_bias, "hidden_bias"),
      h0_data(place, h0, "h0"), c0_data(place, c0, "c0"), lengths_data(place, lengths, "lengths");
  Tensor y = empty(gates, {steps, batch, l.hidden}), h_n = empty(gates, {batch, l.hidden});
  Tensor c_n = empty(gates, {l.cell == Cell::kLstm ? batch : 0, l.hidden});
  Tensor saved = empty(gates, {steps, batch, kSavedValues, l.hidden});
  Tensor state = empty(gates, {2, batch, l.hidden});
  Tensor arrivals = zero_word(gates);
  launch_rnn_forward(
      l.cell,
      {l.sizes, l.mask, gates_data.data<float>(), bias_data.data<float>(), h0_data.data<float>(),
       c0_data.data<float>(), lengths_data.data<int64_t>(), reverse, data(y), data(state),
       data(h_n), data(c_n), data(saved), word(arrivals)},
      place.stream());
  return {y, h_n, c_n, saved};
}

std::tuple<Tensor, Tensor, Tensor> loop_backward(
    Tensor saved,
    Tensor weight,
    std::optional<Tensor> bits,
    std::optional<Tensor> dy,
    std::optional<Tensor> dh_n,
    std::optional<Tensor> dc_n,
    std::optional<Tensor> lengths,
    int64_t cell,
    bool reverse,
    int64_t groups,
    int64_t samples) {
  const Place place(saved);
  const int64_t steps = saved.size(0), batch = saved.size(1);
  const Loop l(place, weight, bits, cell, steps, batch, groups, samples);
  const Operand saved_data(place, saved, "saved"), dy_data(place, dy, "dy"),
      dh_data(place, dh_n, "dh_n"), dc_data(place, dc_n, "dc_n"),
      lengths_data(place, lengths, "lengths");
  Tensor dgates = empty(saved, {steps, batch, kGateGradients, l.hidden});
  Tensor dh0 = empty(saved, {batch, l.hidden});
  Tensor dc0 = empty(saved, {l.cell == Cell::kLstm ? batch : 0, l.hidden});
  Tensor arrivals = zero_word(saved);
  launch_rnn_backward(
      l.cell,
      {l.sizes, l.mask, saved_data.data<float>(), dy_data.data<float>(), dh_data.data<float>(),
       dc_data.data<float>(), lengths_data.data<int64_t>(), reverse, data(dgates), data(dh0),
       data(dc0), word(arrivals)},
      place.stream());
  return {dgates, dh0, dc0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  m.impl("rnn_loop", TORCH_BOX(&loop));
  m.impl("rnn_loop_backward", TORCH_BOX(&loop_backward));
}

}  // namespace modmask::cuda
