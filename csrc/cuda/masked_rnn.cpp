// modmask::rnn_loop and its gradient: in one launch each, or step by step. The schemas live in
// Python.

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

// The masked weight and the sizes; `sizes` has no units where the loop does not fit one launch on
// the current device and is cut into steps.
struct Loop {
  const Cell cell;
  const Operand weight_data;
  const Operand bits_data;
  const int64_t hidden;
  const RnnSteps steps;
  const RnnSizes sizes;
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
        steps{steps, batch / groups, groups, hidden},
        sizes(plan_rnn_here(cell, steps, batch / groups, groups, hidden)) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32");
    STD_TORCH_CHECK(batch % groups == 0, "groups must divide the batch, ", batch);
    STD_TORCH_CHECK(hidden > 0 && batch > 0, "a time loop needs sequences and hidden units");
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

  bool in_one_launch() const {
    return sizes.units > 0;
  }

  int64_t gates() const {
    return cell == Cell::kLstm ? kGateCount<Cell::kLstm> : kGateCount<Cell::kGru>;
  }

  // The layer of the product of every step; `parts` gets room for it.
  MaskedLinear layer(const Tensor& like, bool backward, std::optional<Tensor>& parts) const {
    STD_TORCH_CHECK(mask.bits != nullptr, "a time loop in steps needs bits");
    const MaskedLinear l = rnn_layer(steps, mask, static_cast<int>(gates()));
    parts = empty(like, {masked_linear_partials(l, backward)});
    return l;
  }
};

// A state, or its gradient, that kernels change in place.
Tensor started(
    const std::optional<Tensor>& from, const Tensor& like, int64_t batch, int64_t hidden) {
  if (!from.has_value()) {
    return torch::stable::new_zeros(like, {batch, hidden});
  }
  STD_TORCH_CHECK(
      from->dim() == 2 && from->size(0) == batch && from->size(1) == hidden,
      "states must be [batch, hidden]");
  Tensor state = empty(like, {batch, hidden});
  torch::stable::copy_(state, *from);
  return state;
}

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
  const int64_t cells = l.cell == Cell::kLstm ? batch : 0;
  Tensor y = empty(gates, {steps, batch, l.hidden});
  Tensor saved = empty(gates, {steps, batch, kSavedValues, l.hidden});
  if (!l.in_one_launch()) {
    Tensor h_n = started(h0, gates, batch, l.hidden);
    Tensor c_n = started(cells > 0 ? c0 : std::nullopt, gates, cells, l.hidden);
    std::optional<Tensor> parts;
    const MaskedLinear layer = l.layer(gates, false, parts);
    launch_rnn_steps_forward(
        l.cell,
        {l.steps, data(*parts), gates_data.data<float>(), bias_data.data<float>(),
         lengths_data.data<int64_t>(), h0.has_value(), reverse, data(y), data(saved), data(h_n),
         data(c_n)},
        layer, place.stream());
    return {y, h_n, c_n, saved};
  }
  Tensor h_n = empty(gates, {batch, l.hidden}), c_n = empty(gates, {cells, l.hidden});
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
  const int64_t cells = l.cell == Cell::kLstm ? batch : 0;
  if (!l.in_one_launch()) {
    Tensor dh0 = started(dh_n, saved, batch, l.hidden);
    Tensor dc0 = started(cells > 0 ? dc_n : std::nullopt, saved, cells, l.hidden);
    Tensor recurrent = empty(saved, {cells > 0 ? 0 : batch, l.gates() * l.hidden});
    std::optional<Tensor> parts;
    const MaskedLinear layer = l.layer(saved, true, parts);
    launch_rnn_steps_backward(
        l.cell,
        {l.steps, data(*parts), saved_data.data<float>(), dy_data.data<float>(),
         lengths_data.data<int64_t>(), reverse, data(dgates), data(recurrent), data(dh0),
         data(dc0)},
        layer, place.stream());
    return {dgates, dh0, dc0};
  }
  Tensor dh0 = empty(saved, {batch, l.hidden}), dc0 = empty(saved, {cells, l.hidden});
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
  MODMASK_IMPL(m, "rnn_loop", loop);
  MODMASK_IMPL(m, "rnn_loop_backward", loop_backward);
}

}  // namespace modmask::cuda
