// modmask::sample_mask, sample_mask_packed and the backward on the CPU. Schemas live in Python.

#include <optional>
#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

struct SampleArguments {
  SampleShape shape;
  Contiguous logits, seed;
  CutStore cuts;
  MaskSpec spec;

  SampleArguments(
      const Tensor& logits_,
      const std::optional<Tensor>& seed_,
      const Draw& draw,
      const std::vector<int64_t>& n_of_m)
      : shape(logits_, seed_), logits(logits_, shape.shared), seed(seed_) {
    spec = mask_spec(seed_, seed, shape.sets, draw);
    spec.shared = shape.shared;
    spec.tensor_id =
        cuts.add(spec, draw.estimator, draw.tensor_id, logits.floats(), shape.count, spec.shared);
    if (!n_of_m.empty()) {
      shape.keep_n_of_m(spec.layout, logits_, n_of_m, draw);
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
  Tensor values = empty_like(logits, a.shape.of_values(logits, a.spec.samples));
  if (values.numel() > 0) {
    active_kernels().sample_values(
        a.spec, a.logits.floats(), a.shape.count, static_cast<float*>(values.mutable_data_ptr()),
        torch_runner());
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
  Tensor bits = torch::stable::new_empty(logits, a.shape.of_bits(a.spec.samples), ScalarType::Byte);
  if (bits.numel() > 0) {
    active_kernels().sample_bits(
        a.spec, a.logits.floats(), a.shape.count, static_cast<uint8_t*>(bits.mutable_data_ptr()),
        torch_runner());
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
  const Contiguous d_data(dvalues);
  check_float32(dvalues, "dvalues");
  Tensor dlogits = empty_like(logits, logits.sizes());
  if (a.spec.samples == 0) {
    torch::stable::zero_(dlogits);
  } else if (dlogits.numel() > 0) {
    active_kernels().sample_backward(
        a.spec, a.logits.floats(), d_data.floats(), a.shape.count,
        static_cast<float*>(dlogits.mutable_data_ptr()), torch_runner());
  }
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  MODMASK_IMPL(m, "sample_mask", sample_mask);
  MODMASK_IMPL(m, "sample_mask_packed", sample_mask_packed);
  MODMASK_IMPL(m, "sample_mask_backward", sample_mask_backward);
}

}  // namespace modmask
