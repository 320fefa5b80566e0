// The time loop of masked recurrent layers.
#include "linear_call.h"

#include "cuda/rnn_cell.cuh"

using namespace modmask::cuda;

namespace {

template <Cell kCell>
RnnSizes sizes(const Call& call) {
  return plan_rnn<kCell>(
      static_cast<int>(call.integer("steps")), static_cast<int>(call.integer("rows")),
      static_cast<int>(call.integer("groups")), static_cast<int>(call.integer("hidden")),
      static_cast<int>(call.integer("multiprocessors")),
      static_cast<size_t>(call.integer("most_shared")));
}

RnnMask mask(const Call& call) {
  return {
      call.pointer<const float>("weight"), call.pointer<const uint8_t>("bits"),
      call.integer("set_stride", 0), call.integer("sample_stride", 0),
      static_cast<int>(call.integer("samples", 1))};
}

template <typename F>
void with_cell(const Call& call, const F& f) {
  if (call.text("cell") == "lstm") {
    f(std::integral_constant<Cell, Cell::kLstm>{});
  } else {
    f(std::integral_constant<Cell, Cell::kGru>{});
  }
}

RnnSteps steps(const Call& call) {
  return {
      call.integer("steps"), call.integer("rows"), call.integer("groups"), call.integer("hidden")};
}

// The product of one step, as the loops call it; `parts` holds its parts.
struct Product {
  const Call& call;
  const MaskedLinear layer;
  const bool backward;
  mutable std::vector<float> parts;

  Product(const Call& call_, int gates, bool backward_)
      : call(call_), layer(rnn_layer(steps(call_), mask(call_), gates)), backward(backward_) {
    const LinearParams p = linear_params(layer, backward, nullptr, nullptr);
    parts.resize(p.plan.splits * layer.batch() * (backward ? layer.in : layer.out), NAN);
    call.device.buffer("parts", parts.data(), parts.size() * sizeof(float), sizeof(float));
  }

  int64_t operator()(const float* from) const {
    const LinearParams p = linear_params(layer, backward, from, parts.data());
    run_hard_product<MaskMode::kPacked>(call, p);
    return p.plan.splits;
  }
};

}  // namespace

KERNEL(plan_rnn) {
  auto* plan = call.pointer<int>("plan");
  with_cell(call, [&](auto cell) {
    const RnnSizes s = sizes<decltype(cell)::value>(call);
    plan[0] = s.units;
    plan[1] = s.chunk_rows;
  });
}

KERNEL(rnn_forward) {
  with_cell(call, [&](auto cell) {
    constexpr Cell kCell = decltype(cell)::value;
    const RnnForward p{
        sizes<kCell>(call),
        mask(call),
        call.pointer<const float>("gates"),
        call.pointer<const float>("hidden_bias"),
        call.pointer<const float>("h0"),
        call.pointer<const float>("c0"),
        call.pointer<const int64_t>("lengths"),
        call.integer("reverse") != 0,
        call.pointer<float>("y"),
        call.pointer<float>("h"),
        call.pointer<float>("h_n"),
        call.pointer<float>("c_n"),
        call.pointer<float>("saved"),
        call.pointer<uint32_t>("arrivals")};
    call.launch(rnn_shape<kCell>(p.size, false), [&] { rnn_forward<kCell>(p); }, true);
  });
}

KERNEL(rnn_backward) {
  with_cell(call, [&](auto cell) {
    constexpr Cell kCell = decltype(cell)::value;
    const RnnBackward p{
        sizes<kCell>(call),
        mask(call),
        call.pointer<const float>("saved"),
        call.pointer<const float>("dy"),
        call.pointer<const float>("dh_n"),
        call.pointer<const float>("dc_n"),
        call.pointer<const int64_t>("lengths"),
        call.integer("reverse") != 0,
        call.pointer<float>("dgates"),
        call.pointer<float>("dh0"),
        call.pointer<float>("dc0"),
        call.pointer<uint32_t>("arrivals")};
    call.launch(rnn_shape<kCell>(p.size, true), [&] { rnn_backward<kCell>(p); }, true);
  });
}

KERNEL(rnn_steps_forward) {
  with_cell(call, [&](auto cell) {
    constexpr Cell kCell = decltype(cell)::value;
    Product product(call, kGateCount<kCell>, false);
    const RnnStepsForward p{
        steps(call),
        product.parts.data(),
        call.pointer<const float>("gates"),
        call.pointer<const float>("hidden_bias"),
        call.pointer<const int64_t>("lengths"),
        call.integer("started") != 0,
        call.integer("reverse") != 0,
        call.pointer<float>("y"),
        call.pointer<float>("saved"),
        call.pointer<float>("h_n"),
        call.pointer<float>("c_n")};
    rnn_steps_forward<kCell>(p, product, [&](const RnnCellForward& c) {
      call.launch(rnn_cell_shape(p.size), [&] { rnn_cell_forward<kCell>(c); });
    });
  });
}

KERNEL(rnn_steps_backward) {
  with_cell(call, [&](auto cell) {
    constexpr Cell kCell = decltype(cell)::value;
    Product product(call, kGateCount<kCell>, true);
    const RnnStepsBackward p{
        steps(call),
        product.parts.data(),
        call.pointer<const float>("saved"),
        call.pointer<const float>("dy"),
        call.pointer<const int64_t>("lengths"),
        call.integer("reverse") != 0,
        call.pointer<float>("dgates"),
        call.pointer<float>("recurrent"),
        call.pointer<float>("dh0"),
        call.pointer<float>("dc0")};
    rnn_steps_backward<kCell>(p, product, [&](const RnnCellBackward& c) {
      call.launch(rnn_cell_shape(p.size), [&] { rnn_cell_backward<kCell>(c); });
    });
  });
}

// One step by itself, without a product, and back.
KERNEL(rnn_cell_forward) {
  with_cell(call, [&](auto cell) {
    constexpr Cell kCell = decltype(cell)::value;
    const RnnCellForward p{
        steps(call),
        {nullptr, 0},
        call.pointer<const float>("gates"),
        nullptr,
        nullptr,
        0,
        call.pointer<float>("y"),
        call.pointer<float>("saved"),
        call.pointer<float>("h"),
        call.pointer<float>("c")};
    call.launch(rnn_cell_shape(p.size), [&] { rnn_cell_forward<kCell>(p); });
  });
}

KERNEL(rnn_cell_backward) {
  with_cell(call, [&](auto cell) {
    constexpr Cell kCell = decltype(cell)::value;
    const RnnCellBackward p{
        steps(call),
        {nullptr, 0},
        call.pointer<const float>("saved"),
        nullptr,
        nullptr,
        0,
        call.pointer<float>("dgates"),
        call.pointer<float>("recurrent"),
        call.pointer<float>("dh"),
        call.pointer<float>("dc")};
    call.launch(rnn_cell_shape(p.size), [&] { rnn_cell_backward<kCell>(p); });
  });
}
