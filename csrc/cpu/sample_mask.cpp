// modmask::sample_mask, sample_mask_packed and the backward on the CPU. Schemas live in Python.

#include <optional>
#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

// With a seed per set, the first dimension of the logits is the sets; else there is one set.
bool has_sets(const std::optional<Tensor>& seed) {
  return seed.has_value() && seed->dim() > 0;
}

struct SampleArguments {
  Contiguous logits, seed;
  CutStore cuts;
  MaskSpec spec;
  int64_t count;  // of each set

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
      : logits(logits_, has_sets(seed_) && are_shared(logits_, logits_.dim())), seed(seed_) {
    check_float32(logits_, "logits");
    const bool per_set = has_sets(seed_);
    const int64_t sets = per_set ? seed_->size(0) : 1;
    STD_TORCH_CHECK(
        !per_set || (logits_.dim() > 0 && logits_.size(0) == sets),
        "logits must be [sets, ...] where seed is [sets]");
    spec = mask_spec(
        seed_, seed, sets, samples, tensor_id, sample_offset, element_offset, tau, hard, estimator);
    count = sets > 0 ? logits_.numel() / sets : 0;
    spec.shared = per_set && are_shared(logits_, logits_.dim());
    spec.tensor_id = cuts.add(spec, estimator, tensor_id, logits.floats(), count, spec.shared);
    if (!n_of_m.empty()) {
      const int64_t inputs_at = per_set ? 2 : 1;
      STD_TORCH_CHECK(
          hard && logits_.dim() > inputs_at, "n_of_m needs hard masks of logits [out, in, ...]");
      int64_t after = 1;
      for (int64_t d = inputs_at + 1; d < logits_.dim(); ++d) {
        after *= logits_.size(d);
      }
      keep_n_of_m(spec.layout, n_of_m, logits_.size(inputs_at), after, estimator);
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
  std::vector<int64_t> shape{a.spec.samples};
  for (int64_t d = 0; d < logits.dim(); ++d) {
    shape.push_back(logits.size(d));
  }
  Tensor values = empty_like(logits, shape);
  if (values.numel() > 0) {
    active_kernels().sample_values(
        a.spec, a.logits.floats(), a.count, static_cast<float*>(values.mutable_data_ptr()),
        torch_runner());
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
  std::vector<int64_t> shape{a.spec.samples};
  if (has_sets(seed)) {
    shape.push_back(a.spec.sets);
  }
  shape.push_back((a.count + 7) / 8);
  Tensor bits = torch::stable::new_empty(logits, shape, ScalarType::Byte);
  if (bits.numel() > 0) {
    active_kernels().sample_bits(
        a.spec, a.logits.floats(), a.count, static_cast<uint8_t*>(bits.mutable_data_ptr()),
        torch_runner());
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
  const Contiguous d_data(dvalues);
  check_float32(dvalues, "dvalues");
  Tensor dlogits = empty_like(logits, logits.sizes());
  if (a.spec.samples == 0) {
    torch::stable::zero_(dlogits);
  } else if (dlogits.numel() > 0) {
    active_kernels().sample_backward(
        a.spec, a.logits.floats(), d_data.floats(), a.count,
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
