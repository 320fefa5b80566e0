// modmask::sample_mask_cuda, sample_mask_packed_cuda and the backward. Schemas live in Python.

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

  SampleArguments(
      const Tensor& logits_,
      const std::optional<Tensor>& seed_,
      int64_t samples,
      int64_t tensor_id,
      int64_t sample_offset,
      int64_t element_offset,
      double tau,
      bool hard,
      const EstimatorArguments& estimator,
      const std::vector<int64_t>& n_of_m)
      : place(logits_),
        shape(logits_, seed_),
        logits(place, logits_, "logits", shape.shared),
        seed(place, seed_, "seed") {
    mask = drawn_masks<MaskParams>(
        seed_, seed.data<int64_t>(), shape.sets, samples, tensor_id, sample_offset, element_offset,
        tau, estimator);
    STD_TORCH_CHECK(mask.estimator != Estimator::kTopK, "top_k has no CUDA kernel");
    mask.shared = shape.shared;
    if (!n_of_m.empty()) {
      shape.keep_n_of_m(mask, logits_, n_of_m, hard, estimator);
    }
  }
};

Tensor sample_mask(
    Tensor logits,
    std::optional<Tensor> seed,
    int64_t samples,
    double tau,
    bool hard,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    int64_t estimator,
    double low,
    double high,
    double clamp,
    bool antithetic,
    std::vector<int64_t> n_of_m) {
  const SampleArguments a(
      logits, seed, samples, tensor_id, sample_offset, element_offset, tau, hard,
      {estimator, low, high, clamp, antithetic}, n_of_m);
  Tensor values = empty_like(logits, a.shape.of_values(logits, a.mask.samples));
  if (values.numel() > 0) {
    launch_sample_values(
        a.mask, a.logits.data<float>(), a.shape.count, hard, results<float>(values),
        a.place.stream());
  }
  return values;
}

Tensor sample_mask_packed(
    Tensor logits,
    std::optional<Tensor> seed,
    int64_t samples,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    int64_t estimator,
    double low,
    double high,
    double clamp,
    bool antithetic,
    std::vector<int64_t> n_of_m) {
  const SampleArguments a(
      logits, seed, samples, tensor_id, sample_offset, element_offset, 1.0, true,
      {estimator, low, high, clamp, antithetic}, n_of_m);
  Tensor bits = torch::stable::new_empty(logits, a.shape.of_bits(a.mask.samples), ScalarType::Byte);
  if (bits.numel() > 0) {
    launch_sample_bits(
        a.mask, a.logits.data<float>(), a.shape.count, results<uint8_t>(bits), a.place.stream());
  }
  return bits;
}

Tensor sample_mask_backward(
    Tensor dvalues,
    Tensor logits,
    std::optional<Tensor> seed,
    int64_t samples,
    double tau,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    int64_t estimator,
    double low,
    double high,
    double clamp,
    bool antithetic,
    std::vector<int64_t> n_of_m) {
  const SampleArguments a(
      logits, seed, samples, tensor_id, sample_offset, element_offset, tau, true,
      {estimator, low, high, clamp, antithetic}, n_of_m);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  m.impl("sample_mask_cuda", TORCH_BOX(&sample_mask));
  m.impl("sample_mask_packed_cuda", TORCH_BOX(&sample_mask_packed));
  m.impl("sample_mask_backward_cuda", TORCH_BOX(&sample_mask_backward));
}

}  // namespace modmask::cuda
