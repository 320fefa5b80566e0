// Shared by the bindings of all devices: checks of arguments and the tensors of results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "common/estimator.h"

namespace modmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_float32(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
}

inline void check_same_type(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

// Contiguous and uninitialised, on the device of `like`. Straight from the allocator: an operation
// looked up by name costs several microseconds.
inline Tensor empty_as(
    int32_t dtype, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle created;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device,
      like.get_device_index(), &created));
  return Tensor(created);
}

// The same with the dtype of `like`.
inline Tensor empty_like(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_as(dtype, like, sizes);
}

// Whether logits [sets, ...] of so many dimensions are those of one set, expanded.
inline bool are_shared(const Tensor& logits, int64_t dims) {
  if (logits.dim() != dims || logits.size(0) < 2 || logits.stride(0) != 0) {
    return false;
  }
  int64_t step = 1;
  for (int64_t d = dims - 1; d > 0; step *= logits.size(d--)) {
    if (logits.size(d) != 1 && logits.stride(d) != step) {
      return false;
    }
  }
  return true;
}

// How masks follow from logits and noise, as the schemas say it.
struct EstimatorArguments {
  using Members = std::tuple<int64_t, double, double, double, bool>;

  int64_t code;
  double low;
  double high;
  double clamp;
  bool antithetic;
};

// The masks of an operation, as the schemas say them. `bias_tensor_id` is of no use where one
// parameter is masked.
struct Draw {
  using Members =
      std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double, bool, EstimatorArguments>;

  int64_t tensor_id;
  int64_t bias_tensor_id;
  int64_t sample_offset;
  int64_t element_offset;
  int64_t samples;
  double tau;
  bool hard;
  EstimatorArguments estimator;
};

// The same of one parameter, behind the samples, temperature and hardness, where it has these.
struct SampledDraw {
  using Members = std::tuple<int64_t, int64_t, int64_t, EstimatorArguments>;

  int64_t tensor_id;
  int64_t sample_offset;
  int64_t element_offset;
  EstimatorArguments estimator;

  Draw of(int64_t samples, double tau, bool hard) const {
    return {tensor_id, 0, sample_offset, element_offset, samples, tau, hard, estimator};
  }
};

// What every masked product begins with.
struct Operands {
  using Members = std::tuple<
      Tensor,
      Tensor,
      Tensor,
      std::optional<Tensor>,
      std::optional<Tensor>,
      std::optional<Tensor>>;

  Tensor x;
  Tensor weight;
  Tensor logits;
  std::optional<Tensor> bias;
  std::optional<Tensor> bias_logits;
  std::optional<Tensor> seed;
};

// Which of their gradients are asked for.
struct Needs {
  using Members = std::tuple<bool, bool, bool, bool, bool>;

  bool x;
  bool weight;
  bool logits;
  bool bias;
  bool bias_logits;
};

// `seed` is int64, of shape [], [sets] or [sets, draws], or absent where there is no noise.
// `Spec` is how the kernels of a device are told of masks, `seeds` the data there.
template <typename Spec>
Spec drawn_masks(
    const std::optional<Tensor>& seed, const int64_t* seeds, int64_t sets, const Draw& draw) {
  const EstimatorArguments& estimator = draw.estimator;
  STD_TORCH_CHECK(estimator.code >= 0 && estimator.code <= 4, "estimator must be from 0 to 4");
  Spec spec{};
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed must be int64");
    STD_TORCH_CHECK(
        seed->dim() == 0 || (seed->dim() <= 2 && seed->size(0) == sets),
        "seed must have shape [] or [sets] with sets = ", sets);
    spec.seeds = seeds;
    spec.draws = seed->dim() == 2 ? seed->size(1) : 1;
    STD_TORCH_CHECK(spec.draws > 0, "seed must not be empty");
    spec.seed_stride = seed->dim() == 0 ? 0 : spec.draws;
  }
  spec.sets = sets;
  spec.samples = seed.has_value() ? spec.draws * draw.samples : 1;
  spec.sample_offset = draw.sample_offset;
  spec.element_offset = draw.element_offset;
  spec.tensor_id = draw.tensor_id;
  spec.tau = static_cast<float>(draw.tau);
  spec.estimator = static_cast<Estimator>(estimator.code);
  spec.low = static_cast<float>(estimator.low);
  spec.high = static_cast<float>(estimator.high);
  spec.least_u = static_cast<float>(estimator.clamp);
  spec.most_u = static_cast<float>(1.0 - estimator.clamp);
  spec.antithetic = estimator.antithetic;
  return spec;
}

// n of every m weights, of a parameter with `inputs` in its dimension 1, `after` weights for each.
// `Layout` has keep, among and stride.
template <typename Layout>
void keep_n_of_m(
    Layout& layout,
    const std::vector<int64_t>& n_of_m,
    int64_t inputs,
    int64_t after,
    const EstimatorArguments& estimator) {
  const int64_t n = n_of_m[0], m = n_of_m.size() == 2 ? n_of_m[1] : 0;
  STD_TORCH_CHECK(
      0 < n && n <= m && inputs % m == 0,
      "n_of_m must be n and m, where m divides the inputs of weight");
  STD_TORCH_CHECK(
      estimator.code == static_cast<int64_t>(Estimator::kGumbelSigmoid),
      "n_of_m needs the estimator gumbel_sigmoid");
  layout.keep = n;
  layout.among = m;
  layout.stride = after;
}

// How many of `count` logits top_k keeps.
inline int64_t kept_by_top_k(
    const EstimatorArguments& estimator, int64_t element_offset, int64_t count) {
  STD_TORCH_CHECK(
      element_offset == 0, "top_k needs the logits as a whole: element_offset must be 0");
  STD_TORCH_CHECK(
      estimator.low >= 0.0 && estimator.low <= 1.0, "the fraction of top_k must be in [0, 1]");
  return count - static_cast<int64_t>((1.0 - estimator.low) * static_cast<double>(count));
}

// With a seed per set, the first dimension of the logits is the sets; else there is one set.
struct SampleShape {
  bool per_set;
  int64_t sets;
  int64_t count;  // of each set
  bool shared;    // all sets have the logits of the first one

  SampleShape(const Tensor& logits, const std::optional<Tensor>& seed)
      : per_set(seed.has_value() && seed->dim() > 0), sets(per_set ? seed->size(0) : 1) {
    check_float32(logits, "logits");
    STD_TORCH_CHECK(
        !per_set || (logits.dim() > 0 && logits.size(0) == sets),
        "logits must be [sets, ...] where seed is [sets]");
    count = sets > 0 ? logits.numel() / sets : 0;
    shared = per_set && are_shared(logits, logits.dim());
  }

  template <typename Layout>
  void keep_n_of_m(
      Layout& layout,
      const Tensor& logits,
      const std::vector<int64_t>& n_of_m,
      const Draw& draw) const {
    const int64_t inputs_at = per_set ? 2 : 1;
    STD_TORCH_CHECK(
        draw.hard && logits.dim() > inputs_at, "n_of_m needs hard masks of logits [out, in, ...]");
    int64_t after = 1;
    for (int64_t d = inputs_at + 1; d < logits.dim(); ++d) {
      after *= logits.size(d);
    }
    modmask::keep_n_of_m(layout, n_of_m, logits.size(inputs_at), after, draw.estimator);
  }

  std::vector<int64_t> of_values(const Tensor& logits, int64_t samples) const {
    std::vector<int64_t> shape{samples};
    for (int64_t d = 0; d < logits.dim(); ++d) {
      shape.push_back(logits.size(d));
    }
    return shape;
  }

  std::vector<int64_t> of_bits(int64_t samples) const {
    std::vector<int64_t> shape{samples};
    if (per_set) {
      shape.push_back(sets);
    }
    shape.push_back((count + 7) / 8);
    return shape;
  }
};

}  // namespace modmask
