// modmask::masked_product_cuda and the gradients of its parameters. The schemas live in Python.

#include <tuple>
#include <vector>

#include "bindings.h"

namespace modmask::cuda {

namespace {

// The layer in the words of the kernels, with the operands it points into. `rows`: x or dy, or
// their sums over the rows of each group; null where there are none.
class Layer {
 public:
  Layer(
      const Tensor& rows,
      const std::optional<Tensor>& weight,
      const Tensor& logits,
      const std::optional<Tensor>& bias,
      const std::optional<Tensor>& bias_logits,
      const std::optional<Tensor>& seed,
      const std::optional<Tensor>& words,
      const Draw& draw)
      : place(rows),
        weight_(place, weight, "weight"),
        logits_(place, logits, "logits", are_shared(logits, logits.dim())),
        bias_(place, bias, "bias"),
        bias_logits_(place, bias_logits, "bias_logits"),
        seed_(place, seed, "seed"),
        words_(place, words, "words") {
    check_float32(logits, "logits");
    const int64_t sets = logits.size(0);
    layer.mask = drawn_masks<MaskParams>(seed, seed_.data<int64_t>(), sets, draw);
    layer.bias_mask = layer.mask;
    layer.bias_mask.tensor_id = draw.bias_tensor_id;
    layer.bias_mask.element_offset = 0;
    layer.hard = draw.hard || words.has_value();
    const int64_t groups = sets * layer.mask.samples;
    STD_TORCH_CHECK(
        groups > 0 && rows.size(0) % groups == 0,
        "the batch does not divide into sets * samples groups");
    layer.rows = rows.size(0) / groups;
    if (weight.has_value()) {
      layer.type = element_type(*weight, "weight");
      layer.out = weight->size(0);
      layer.in = weight->size(1);
      layer.weight = weight_.data<void>();
      layer.logits = logits_.data<float>();
      layer.mask.shared = are_shared(logits, logits.dim());
      STD_TORCH_CHECK(
          words.has_value() ? words->scalar_type() == ScalarType::Int && words->dim() == 3 &&
                                  words->size(0) * words->size(1) == groups &&
                                  words->size(2) * 32 >= weight->numel()
                            : logits.numel() == sets * weight->numel(),
          "there must be logits [sets, out, in], or words [sets, samples, words of the weight]");
    } else {
      layer.out = logits.size(1);
    }
    // their masks are packed, and they have the slope of the threshold
    if (layer.mask.estimator == Estimator::kTopK) {
      layer.mask.estimator = Estimator::kThreshold;
    }
    if (words.has_value()) {
      const int64_t bytes = words->size(2) * 4;
      layer.packed = {const_cast<uint8_t*>(words_.data<uint8_t>()), words->size(1) * bytes, bytes};
    }
    if (bias.has_value()) {
      layer.type = element_type(*bias, "bias");
      layer.bias = bias_.data<void>();
    }
    if (bias_logits.has_value()) {
      layer.bias_logits = bias_logits_.data<float>();
      cuts_ =
          Cuts(place, layer.bias_mask, draw.estimator, *bias_logits, layer.bias_logits, layer.out);
    }
  }

  const Place place;
  MaskedLinear layer{};

 private:
  Operand weight_, logits_, bias_, bias_logits_, seed_, words_;
  Cuts cuts_;
};

// Uninitialised, or of size 0 where it is not needed.
Tensor needed(const Tensor& like, bool need, std::initializer_list<int64_t> shape) {
  const int64_t none[] = {0};
  return need ? torch::stable::new_empty(like, shape)
              : empty_like(like, torch::headeronly::IntHeaderOnlyArrayRef(none, 1));
}

// y [batch, out] of x [batch, in], or dx of dy; words are those of modmask::mask_words.
Tensor product(
    const Tensor& a,
    const Tensor& weight,
    const Tensor& logits,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bias_logits,
    const std::optional<Tensor>& seed,
    const std::optional<Tensor>& words,
    bool backward,
    const Draw& draw) {
  const Layer l(a, weight, logits, bias, bias_logits, seed, words, draw);
  check_same_type(a, weight, "the batch");
  STD_TORCH_CHECK(
      a.dim() == 2 && a.size(1) == weight.size(backward ? 0 : 1),
      "the batch must be as wide as weight");
  STD_TORCH_CHECK(
      !draw.hard || words.has_value() || mode_of(l.layer.mask) == MaskMode::kPlain,
      "these masks must be packed");
  const Operand data(l.place, a, "the batch");
  Tensor result = torch::stable::new_empty(a, {a.size(0), backward ? l.layer.in : l.layer.out});
  if (result.numel() > 0) {
    Tensor partials =
        torch::stable::new_empty(a, {masked_linear_partials(l.layer, backward)}, ScalarType::Float);
    const auto launch = backward ? launch_masked_linear_dx : launch_masked_linear;
    launch(
        l.layer, data.data<void>(), results<float>(partials), results<void>(result),
        l.place.stream());
  }
  return result;
}

// (dweight, dlogits [sets, out, in])
std::tuple<Tensor, Tensor> gradients(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& logits,
    const std::optional<Tensor>& seed,
    const std::optional<Tensor>& words,
    bool need_weight,
    bool need_logits,
    const Draw& draw) {
  const Layer l(x, weight, logits, std::nullopt, std::nullopt, seed, words, draw);
  check_same_type(x, weight, "x");
  check_same_type(dy, weight, "dy");
  STD_TORCH_CHECK(
      x.dim() == 2 && dy.dim() == 2 && x.size(1) == l.layer.in && dy.size(1) == l.layer.out &&
          x.size(0) == dy.size(0),
      "x must be [batch, in] and dy [batch, out]");
  STD_TORCH_CHECK(
      logits.numel() == logits.size(0) * weight.numel(), "logits must be [sets, out, in]");
  const Operand x_data(l.place, x, "x"), dy_data(l.place, dy, "dy");
  Tensor dweight = needed(weight, need_weight, {l.layer.out, l.layer.in});
  Tensor dlogits = needed(logits, need_logits, {logits.size(0), l.layer.out, l.layer.in});
  if (weight.numel() > 0 && (need_weight || need_logits)) {
    launch_masked_linear_gradients(
        l.layer, x_data.data<void>(), dy_data.data<void>(),
        need_logits ? results<float>(dlogits) : nullptr,
        need_weight ? results<void>(dweight) : nullptr, l.place.stream());
  }
  return {dweight, dlogits};
}

// (dbias, dbias_logits [sets, out]) of a masked bias, from dy [groups, out] summed over rows.
std::tuple<Tensor, Tensor> bias_gradients(
    const Tensor& sums,
    const Tensor& bias,
    const Tensor& bias_logits,
    const std::optional<Tensor>& seed,
    bool need_bias,
    bool need_logits,
    const Draw& draw) {
  const Layer l(sums, std::nullopt, bias_logits, bias, bias_logits, seed, std::nullopt, draw);
  check_float32(sums, "sums");
  STD_TORCH_CHECK(
      sums.dim() == 2 && sums.size(1) == l.layer.out && l.layer.rows == 1 &&
          bias.numel() == l.layer.out,
      "sums must be [groups, out] and bias [out]");
  const Operand data(l.place, sums, "sums");
  Tensor dbias = needed(bias, need_bias, {l.layer.out});
  Tensor dbias_logits = needed(bias_logits, need_logits, {bias_logits.size(0), l.layer.out});
  if (l.layer.out > 0 && (need_bias || need_logits)) {
    launch_bias_gradients(
        l.layer, data.data<float>(), need_bias ? results<void>(dbias) : nullptr,
        need_logits ? results<float>(dbias_logits) : nullptr, l.place.stream());
  }
  return {dbias, dbias_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  MODMASK_IMPL(m, "masked_product_cuda", product);
  MODMASK_IMPL(m, "masked_gradients_cuda", gradients);
  MODMASK_IMPL(m, "masked_bias_gradients_cuda", bias_gradients);
}

}  // namespace modmask::cuda
