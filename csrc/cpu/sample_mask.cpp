// modmask::sample_mask, sample_mask_packed and the backward on the CPU. Schemas live in Python.

#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

// With a seed per set, the first dimension of the logits is the sets; else there is one set.
MaskSpec sample_spec(
    const Tensor& logits,
    const Tensor& seed,
    const Contiguous& seed_data,
    int64_t samples,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    double tau,
    bool hard) {
  check_float32(logits, "logits");
  const int64_t sets = seed.dim() == 0 ? 1 : seed.size(0);
  STD_TORCH_CHECK(
      seed.dim() == 0 || (logits.dim() > 0 && logits.size(0) == sets),
      "logits must be [sets, ...] where seed is [sets]");
  return mask_spec(
      seed, seed_data, sets, samples, tensor_id, sample_offset, element_offset, tau, hard);
}

Tensor sample_mask(
    Tensor logits,
    Tensor seed,
    int64_t samples,
    double tau,
    bool hard,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset) {
  const Contiguous data(logits), seed_data(seed);
  const MaskSpec spec = sample_spec(
      logits, seed, seed_data, samples, tensor_id, sample_offset, element_offset, tau, hard);
  std::vector<int64_t> shape{samples};
  for (int64_t d = 0; d < logits.dim(); ++d) {
    shape.push_back(logits.size(d));
  }
  Tensor values = empty_like(logits, shape);
  if (values.numel() > 0) {
    active_kernels().sample_values(
        spec, data.floats(), logits.numel() / spec.sets,
        static_cast<float*>(values.mutable_data_ptr()), torch_runner());
  }
  return values;
}

Tensor sample_mask_packed(
    Tensor logits,
    Tensor seed,
    int64_t samples,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset) {
  const Contiguous data(logits), seed_data(seed);
  const MaskSpec spec = sample_spec(
      logits, seed, seed_data, samples, tensor_id, sample_offset, element_offset, 1.0, true);
  const int64_t count = spec.sets > 0 ? logits.numel() / spec.sets : 0;
  std::vector<int64_t> shape{samples};
  if (seed.dim() == 1) {
    shape.push_back(spec.sets);
  }
  shape.push_back((count + 7) / 8);
  Tensor bits = torch::stable::new_empty(logits, shape, ScalarType::Byte);
  if (bits.numel() > 0) {
    active_kernels().sample_bits(
        spec, data.floats(), count, static_cast<uint8_t*>(bits.mutable_data_ptr()), torch_runner());
  }
  return bits;
}

Tensor sample_mask_backward(
    Tensor dvalues,
    Tensor logits,
    Tensor seed,
    int64_t samples,
    double tau,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset) {
  const Contiguous data(logits), seed_data(seed), d_data(dvalues);
  check_float32(dvalues, "dvalues");
  const MaskSpec spec = sample_spec(
      logits, seed, seed_data, samples, tensor_id, sample_offset, element_offset, tau, true);
  Tensor dlogits = empty_like(logits, logits.sizes());
  if (samples == 0) {
    torch::stable::zero_(dlogits);
  } else if (dlogits.numel() > 0) {
    active_kernels().sample_backward(
        spec, data.floats(), d_data.floats(), logits.numel() / spec.sets,
        static_cast<float*>(dlogits.mutable_data_ptr()), torch_runner());
  }
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  m.impl("sample_mask", TORCH_BOX(&sample_mask));
  m.impl("sample_mask_packed", TORCH_BOX(&sample_mask_packed));
  m.impl("sample_mask_backward", TORCH_BOX(&sample_mask_backward));
}

}  // namespace modmask
