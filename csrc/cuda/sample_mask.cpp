// modmask::sample_mask_cuda, sample_mask_packed_cuda, the backward, and the masks of a product as
// words of bits. Schemas live in Python.

#include <optional>
#include <vector>

#include "bindings.h"

namespace modmask::cuda {

namespace {

struct SampleArguments {
  Place place;
  SampleShape shape;
  Operand logits, seed;
  MaskParams mask;
  Cuts cuts;

  SampleArguments(
      const Tensor& logits_,
      const std::optional<Tensor>& seed_,
      const Draw& draw,
      const std::vector<int64_t>& n_of_m)
      : place(logits_),
        shape(logits_, seed_),
        logits(place, logits_, "logits", shape.shared),
        seed(place, seed_, "seed") {
    mask = drawn_masks<MaskParams>(seed_, seed.data<int64_t>(), shape.sets, draw);
    mask.shared = shape.shared;
    cuts = Cuts(place, mask, draw.estimator, logits_, logits.data<float>(), shape.count);
    if (!n_of_m.empty()) {
      shape.keep_n_of_m(mask, logits_, n_of_m, draw);
    }
  }
};

Tensor sample_mask(
    const Tensor& logits,
    const std::optional<Tensor>& seed,
    int64_t samples,
    double tau,
    bool hard,
    const SampledDraw& draw,
    const std::vector<int64_t>& n_of_m) {
  const SampleArguments a(logits, seed, draw.of(samples, tau, hard), n_of_m);
  Tensor values = empty_like(logits, a.shape.of_values(logits, a.mask.samples));
  if (values.numel() > 0) {
    launch_sample_values(
        a.mask, a.logits.data<float>(), a.shape.count, hard, results<float>(values),
        a.place.stream());
  }
  return values;
}

Tensor sample_mask_packed(
    const Tensor& logits,
    const std::optional<Tensor>& seed,
    int64_t samples,
    const SampledDraw& draw,
    const std::vector<int64_t>& n_of_m) {
  const SampleArguments a(logits, seed, draw.of(samples, 1.0, true), n_of_m);
  Tensor bits = torch::stable::new_empty(logits, a.shape.of_bits(a.mask.samples), ScalarType::Byte);
  if (bits.numel() > 0) {
    const int64_t bytes = (a.shape.count + 7) / 8;
    launch_sample_bits(
        a.mask, a.logits.data<float>(), a.shape.count,
        {results<uint8_t>(bits), bytes, a.shape.sets * bytes}, a.place.stream());
  }
  return bits;
}

Tensor sample_mask_backward(
    const Tensor& dvalues,
    const Tensor& logits,
    const std::optional<Tensor>& seed,
    int64_t samples,
    double tau,
    const SampledDraw& draw,
    const std::vector<int64_t>& n_of_m) {
  const SampleArguments a(logits, seed, draw.of(samples, tau, true), n_of_m);
  const Operand gradients(a.place, dvalues, "dvalues");
  check_float32(dvalues, "dvalues");
  Tensor dlogits = empty_like(logits, logits.sizes());
  if (a.mask.samples == 0) {
    torch::stable::zero_(dlogits);
  } else if (dlogits.numel() > 0) {
    launch_sample_backward(
        a.mask, a.logits.data<float>(), a.shape.count, gradients.data<float>(),
        results<float>(dlogits), a.place.stream());
  }
  return dlogits;
}

// Words after those of a mask, which tiles of a product read beyond its end.
constexpr int64_t kSlack = 16;

// Hard masks of a weight of shape `shape`, one bit each, for every group: int32 [sets, samples,
// words]. logits: [sets, ...] of that shape, or of one that divides it.
Tensor mask_words(
    const Tensor& logits,
    const std::optional<Tensor>& seed,
    const std::vector<int64_t>& shape,
    int64_t samples,
    const SampledDraw& sampled,
    const std::vector<int64_t>& n_of_m) {
  const Place place(logits);
  const Draw draw = sampled.of(samples, 1.0, true);
  const bool shared = are_shared(logits, logits.dim());
  const Operand data(place, logits, "logits", shared), seeds(place, seed, "seed");
  check_float32(logits, "logits");
  const int64_t dims = static_cast<int64_t>(shape.size());
  STD_TORCH_CHECK(
      0 < dims && dims <= 4 && logits.dim() == dims + 1 && logits.size(0) > 0,
      "logits must be [sets, ...] of a weight of 1 to 4 dimensions");
  const int64_t sets = logits.size(0), count = logits.numel() / sets;
  BlockSizes sizes{};
  int64_t whole = 1;
  for (int64_t d = 0; d < 4; ++d) {
    const int64_t at = d - (4 - dims);
    sizes.whole[d] = at < 0 ? 1 : shape[at];
    sizes.small[d] = at < 0 ? 1 : logits.size(at + 1);
    whole *= sizes.whole[d];
    STD_TORCH_CHECK(
        sizes.small[d] == sizes.whole[d] ||
            (sizes.small[d] > 0 && sizes.whole[d] % sizes.small[d] == 0),
        "logits must have the shape of the weight, or divide it in every dimension");
  }
  MaskParams mask = drawn_masks<MaskParams>(seed, seeds.data<int64_t>(), sets, draw);
  mask.shared = shared;
  const Cuts cuts(place, mask, draw.estimator, logits, data.data<float>(), count);
  if (!n_of_m.empty()) {
    STD_TORCH_CHECK(count == whole && dims > 1, "n_of_m needs logits like the weight [out, in]");
    keep_n_of_m(mask, n_of_m, shape[1], count / (shape[0] * shape[1]), draw.estimator);
  }
  const auto words_of = [&](int64_t bits) {
    return torch::stable::new_empty(
        logits, {sets, mask.samples, (bits + 31) / 32 + kSlack}, ScalarType::Int);
  };
  Tensor small = words_of(count);
  if (count == 0 || mask.samples == 0) {
    return count == whole ? small : words_of(whole);
  }
  const int64_t bytes = small.size(2) * 4;
  launch_sample_bits(
      mask, data.data<float>(), count, {results<uint8_t>(small), mask.samples * bytes, bytes},
      place.stream());
  if (count == whole) {
    return small;
  }
  Tensor words = words_of(whole);
  if (whole > 0) {
    launch_expand_bits(
        sizes, sets * mask.samples, results<uint8_t>(small), bytes, results<uint8_t>(words),
        words.size(2) * 4, place.stream());
  }
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  MODMASK_IMPL(m, "sample_mask_cuda", sample_mask);
  MODMASK_IMPL(m, "sample_mask_packed_cuda", sample_mask_packed);
  MODMASK_IMPL(m, "mask_words_cuda", mask_words);
  MODMASK_IMPL(m, "sample_mask_backward_cuda", sample_mask_backward);
}

}  // namespace modmask::cuda
