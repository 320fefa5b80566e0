// modmask::masked_rnn and its backward on the CPU. Schemas live in Python.

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

struct CellSizes {
  int64_t gates;
  int64_t saved;
};

CellSizes sizes_of(RnnCell cell) {
  return cell == RnnCell::kLstm ? CellSizes{4, 5} : CellSizes{3, 4};
}

// The operands of a layer, as the schemas say them.
struct RnnOperands {
  using Optional = std::optional<Tensor>;
  using Members = std::tuple<
      Tensor,
      Optional,
      Optional,
      Tensor,
      Tensor,
      Tensor,
      Tensor,
      Optional,
      Optional,
      Optional,
      Optional,
      Optional,
      Optional>;

  Tensor x;
  Optional h0, c0;
  Tensor weight_ih, weight_hh, logits_ih, logits_hh;
  Optional bias_ih, bias_hh, bias_logits_ih, bias_logits_hh, seed, lengths;
};

// Its cell and its masks.
struct RnnDraw {
  using Members = std::tuple<
      int64_t,
      bool,
      std::vector<int64_t>,
      int64_t,
      int64_t,
      double,
      bool,
      EstimatorArguments>;

  int64_t cell;
  bool reverse;
  std::vector<int64_t> tensor_ids;
  int64_t sample_offset;
  int64_t samples;
  double tau;
  bool hard;
  EstimatorArguments estimator;

  // Those of any of its parameters, but for their numbers.
  Draw of_masks() const {
    return {0, 0, sample_offset, 0, samples, tau, hard, estimator};
  }
};

// Everything that both directions need, with the contiguous copies it points into.
struct RnnArguments {
  Contiguous x, h0, c0, weight_ih, weight_hh, logits_ih, logits_hh, bias_ih, bias_hh,
      bias_logits_ih, bias_logits_hh, seed, lengths;
  CutStore cuts;
  RnnProblem problem{};

  RnnArguments(const RnnOperands& o, const RnnDraw& draw)
      : x(o.x),
        h0(o.h0),
        c0(o.c0),
        weight_ih(o.weight_ih),
        weight_hh(o.weight_hh),
        logits_ih(o.logits_ih),
        logits_hh(o.logits_hh),
        bias_ih(o.bias_ih),
        bias_hh(o.bias_hh),
        bias_logits_ih(o.bias_logits_ih),
        bias_logits_hh(o.bias_logits_hh),
        seed(o.seed),
        lengths(o.lengths) {
    STD_TORCH_CHECK(draw.cell == 0 || draw.cell == 1, "cell must be 0 (LSTM) or 1 (GRU)");
    problem.cell = draw.cell == 0 ? RnnCell::kLstm : RnnCell::kGru;
    problem.gates = sizes_of(problem.cell).gates;
    STD_TORCH_CHECK(o.x.dim() == 3, "x must be [steps, batch, in]");
    STD_TORCH_CHECK(o.weight_hh.dim() == 2, "weight_hh must be [gates * hidden, hidden]");
    problem.steps = o.x.size(0);
    problem.in = o.x.size(2);
    problem.hidden = o.weight_hh.size(1);
    const int64_t batch = o.x.size(1), out = problem.gates * problem.hidden;
    const int64_t sets = o.logits_ih.dim() == 3 ? o.logits_ih.size(0) : 1;
    const auto check = [](const std::optional<Tensor>& t, const char* name, int64_t numel) {
      if (t.has_value()) {
        check_float32(*t, name);
        STD_TORCH_CHECK(t->numel() == numel, name, " has the wrong number of elements");
      }
    };
    check(o.x, "x", problem.steps * batch * problem.in);
    check(o.h0, "h0", batch * problem.hidden);
    check(o.c0, "c0", batch * problem.hidden);
    check(o.weight_ih, "weight_ih", out * problem.in);
    check(o.weight_hh, "weight_hh", out * problem.hidden);
    check(o.logits_ih, "logits_ih", sets * out * problem.in);
    check(o.logits_hh, "logits_hh", sets * out * problem.hidden);
    check(o.bias_ih, "bias_ih", out);
    check(o.bias_hh, "bias_hh", out);
    check(o.bias_logits_ih, "bias_logits_ih", sets * out);
    check(o.bias_logits_hh, "bias_logits_hh", sets * out);
    STD_TORCH_CHECK(
        (o.bias_ih.has_value() || !o.bias_logits_ih.has_value()) &&
            (o.bias_hh.has_value() || !o.bias_logits_hh.has_value()),
        "logits of a bias must come with that bias");
    if (o.lengths.has_value()) {
      STD_TORCH_CHECK(
          o.lengths->scalar_type() == ScalarType::Long && o.lengths->numel() == batch,
          "lengths must be int64, one per sequence");
    }
    STD_TORCH_CHECK(draw.tensor_ids.size() == 4, "tensor_ids must be four numbers");
    problem.mask = mask_spec(o.seed, seed, sets, draw.of_masks());
    const int64_t groups = sets * problem.mask.samples;
    STD_TORCH_CHECK(
        groups > 0 && batch % groups == 0,
        "the batch of x does not divide into sets * samples groups");
    problem.rows = batch / groups;
    problem.reverse = draw.reverse;
    problem.lengths = static_cast<const int64_t*>(lengths.data());
    problem.x = x.floats();
    problem.h0 = h0.floats();
    problem.c0 = c0.floats();
    const auto both = [](const float*(&to)[2], const Contiguous& ih, const Contiguous& hh) {
      to[0] = ih.floats();
      to[1] = hh.floats();
    };
    both(problem.weights, weight_ih, weight_hh);
    both(problem.logits, logits_ih, logits_hh);
    both(problem.biases, bias_ih, bias_hh);
    both(problem.bias_logits, bias_logits_ih, bias_logits_hh);
    for (int i = 0; i < 2; ++i) {
      const int64_t columns = i == 0 ? problem.in : problem.hidden;
      problem.tensor_ids[i] = cuts.add(
          problem.mask, draw.estimator, draw.tensor_ids[i], problem.logits[i], out * columns);
      problem.tensor_ids[2 + i] = cuts.add(
          problem.mask, draw.estimator, draw.tensor_ids[2 + i], problem.bias_logits[i], out);
    }
  }

  int64_t batch() const {
    return problem.rows * problem.mask.sets * problem.mask.samples;
  }

  bool has_cell() const {
    return problem.cell == RnnCell::kLstm;
  }

  bool empty() const {
    return problem.steps == 0 || batch() == 0 || problem.hidden == 0;
  }

  // Of the saved values, and one that tells whose vectors they are padded to.
  int64_t saved() const {
    const int64_t lanes = active_kernels().lanes;
    const int64_t rows = (problem.rows + lanes - 1) / lanes * lanes;
    return problem.mask.sets * problem.mask.samples * problem.steps * sizes_of(problem.cell).saved *
               problem.hidden * rows +
           1;
  }
};

float* floats(Tensor& t) {
  return t.numel() > 0 ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
}

// `from`, or zeros.
void fill(Tensor& t, const float* from) {
  float* to = floats(t);
  if (from != nullptr) {
    std::copy(from, from + t.numel(), to);
  } else {
    std::fill(to, to + t.numel(), 0.0f);
  }
}

// y, h_n, c_n (empty for a cell without one) and what the backward pass needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_rnn(const RnnOperands& o, const RnnDraw& draw) {
  const RnnArguments a(o, draw);
  const RnnProblem& p = a.problem;
  const int64_t batch = a.batch();
  Tensor y = empty_like(o.x, {p.steps, batch, p.hidden});
  Tensor h_n = empty_like(o.x, {batch, p.hidden});
  Tensor c_n = empty_like(o.x, {a.has_cell() ? batch : 0, p.hidden});
  Tensor saved = empty_like(o.x, {a.saved()});
  if (a.empty()) {
    fill(h_n, p.h0);
    fill(c_n, p.c0);
  } else {
    active_kernels().rnn_forward(
        p, {floats(y), floats(h_n), floats(c_n), floats(saved)}, torch_runner());
  }
  floats(saved)[a.saved() - 1] = static_cast<float>(active_kernels().lanes);
  return {y, h_n, c_n, saved};
}

// Gradients of the eleven tensors from x to bias_logits_hh; one that bit i of `needs` does not ask
// for is empty.
using Eleven = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eleven masked_rnn_backward(
    const std::optional<Tensor>& dy,
    const std::optional<Tensor>& dh_n,
    const std::optional<Tensor>& dc_n,
    const Tensor& y,
    const Tensor& saved,
    const RnnOperands& o,
    const RnnDraw& draw,
    int64_t needs) {
  const RnnArguments a(o, draw);
  const RnnProblem& p = a.problem;
  const Contiguous dy_data(dy), dh_n_data(dh_n), dc_n_data(dc_n), y_data(y), saved_data(saved);
  STD_TORCH_CHECK(
      saved.numel() == a.saved() &&
          saved_data.floats()[a.saved() - 1] == static_cast<float>(active_kernels().lanes),
      "the CPU capability has changed since the forward pass");
  const std::optional<Tensor> tensors[] = {
      o.x,         o.h0,      o.c0,      o.weight_ih,      o.weight_hh,     o.logits_ih,
      o.logits_hh, o.bias_ih, o.bias_hh, o.bias_logits_ih, o.bias_logits_hh};
  std::vector<Tensor> gradients;
  for (int i = 0; i < 11; ++i) {
    static constexpr int64_t kNone[] = {0};
    const bool needed = tensors[i].has_value() && (needs >> i & 1);
    gradients.push_back(empty_like(
        o.x, needed ? tensors[i]->sizes() : torch::headeronly::IntHeaderOnlyArrayRef(kNone)));
  }
  if (a.empty() || p.in == 0) {
    for (Tensor& t : gradients) {
      fill(t, nullptr);
    }
  }
  if (a.empty()) {  // no step: the states pass through
    if (gradients[1].numel() > 0) {
      fill(gradients[1], dh_n_data.floats());
    }
    if (gradients[2].numel() > 0) {
      fill(gradients[2], dc_n_data.floats());
    }
  } else {
    RnnGradients d{};
    d.y = y_data.floats();
    d.saved = saved_data.floats();
    d.dy = dy_data.floats();
    d.dh_n = dh_n_data.floats();
    d.dc_n = dc_n_data.floats();
    d.dx = floats(gradients[0]);
    d.dh0 = floats(gradients[1]);
    d.dc0 = floats(gradients[2]);
    for (int i = 0; i < 2; ++i) {
      d.dweights[i] = floats(gradients[3 + i]);
      d.dlogits[i] = floats(gradients[5 + i]);
      d.dbiases[i] = floats(gradients[7 + i]);
      d.dbias_logits[i] = floats(gradients[9 + i]);
    }
    active_kernels().rnn_backward(p, d, torch_runner());
  }
  std::vector<Tensor>& g = gradients;
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  MODMASK_IMPL(m, "masked_rnn", masked_rnn);
  MODMASK_IMPL(m, "masked_rnn_backward", masked_rnn_backward);
}

}  // namespace modmask
