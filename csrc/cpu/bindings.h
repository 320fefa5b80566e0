// Shared by the bindings of all operations: argument checks and the choice of the capability.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace modmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The table in use: the best one that this CPU supports, unless another one was asked for.
const Kernels& active_kernels();

// Names of the supported capabilities, best first.
const char* const* supported_capabilities(int& count);

// Returns false for an unknown or unsupported name.
bool choose_capability(const char* name);

// torch's own thread pool.
Runner torch_runner();

inline void check_float32(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
}

inline DType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
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

// Keeps a contiguous copy of a tensor on the CPU alive for as long as its pointer is used. One
// operand on the CPU is enough to get here, so each is asked.
class Contiguous {
 public:
  // `as_it_is`: of a tensor whose values lie as they should.
  explicit Contiguous(const std::optional<Tensor>& t, bool as_it_is = false) : tensor_(t) {
    if (!t.has_value()) {
      return;
    }
    int32_t device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t->get(), &device));
    STD_TORCH_CHECK(device == aoti_torch_device_type_cpu(), "all tensors must be on the CPU");
    if (!as_it_is && !t->is_contiguous()) {
      tensor_ = torch::stable::contiguous(*t);
    }
  }

  const void* data() const {
    return tensor_.has_value() ? tensor_->const_data_ptr() : nullptr;
  }

  const float* floats() const {
    return static_cast<const float*>(data());
  }

 private:
  std::optional<Tensor> tensor_;
};

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
  int64_t code;
  double low;
  double high;
  double clamp;
  bool antithetic;
};

// `seed` is int64, of shape [], [sets] or [sets, draws], or absent where there is no noise.
inline MaskSpec mask_spec(
    const std::optional<Tensor>& seed,
    const Contiguous& seed_data,
    int64_t sets,
    int64_t samples,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    double tau,
    bool hard,
    const EstimatorArguments& estimator = {}) {
  STD_TORCH_CHECK(estimator.code >= 0 && estimator.code <= 4, "estimator must be from 0 to 4");
  MaskSpec spec{};
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed must be int64");
    STD_TORCH_CHECK(
        seed->dim() == 0 || (seed->dim() <= 2 && seed->size(0) == sets),
        "seed must have shape [] or [sets] with sets = ", sets);
    spec.seeds = static_cast<const int64_t*>(seed_data.data());
    spec.draws = seed->dim() == 2 ? seed->size(1) : 1;
    STD_TORCH_CHECK(spec.draws > 0, "seed must not be empty");
    spec.seed_stride = seed->dim() == 0 ? 0 : spec.draws;
  }
  spec.sets = sets;
  spec.samples = seed.has_value() ? spec.draws * samples : 1;
  spec.sample_offset = sample_offset;
  spec.element_offset = element_offset;
  spec.tensor_id = tensor_id;
  spec.tau = static_cast<float>(tau);
  spec.hard = hard;
  spec.estimator = static_cast<Estimator>(estimator.code);
  spec.low = static_cast<float>(estimator.low);
  spec.high = static_cast<float>(estimator.high);
  spec.least_u = static_cast<float>(estimator.clamp);
  spec.most_u = static_cast<float>(1.0 - estimator.clamp);
  spec.antithetic = estimator.antithetic;
  return spec;
}

// The cuts of top_k masks, in memory for as long as the spec points to them.
class CutStore {
 public:
  // For one parameter, of `count` logits per set, or in all where the sets share them. To be called
  // before any copy of the spec is used. Returns the number by which the masks of the parameter are
  // asked for: where they have no noise, it only tells the cuts apart, also of equal tensor_ids.
  int64_t add(
      MaskSpec& spec,
      const EstimatorArguments& estimator,
      int64_t tensor_id,
      const float* logits,
      int64_t count,
      bool shared = false) {
    if (spec.estimator != Estimator::kTopK || logits == nullptr) {
      return tensor_id;
    }
    STD_TORCH_CHECK(
        spec.element_offset == 0, "top_k needs the logits as a whole: element_offset must be 0");
    STD_TORCH_CHECK(
        estimator.low >= 0.0 && estimator.low <= 1.0, "the fraction of top_k must be in [0, 1]");
    const int64_t dropped =
        static_cast<int64_t>((1.0 - estimator.low) * static_cast<double>(count));
    std::vector<Cut>& cuts = cuts_[size_];
    cuts.resize(static_cast<size_t>(spec.sets));
    for (int64_t set = 0; set < spec.sets; ++set) {
      if (shared && set > 0) {
        cuts[static_cast<size_t>(set)] = cuts[0];
        continue;
      }
      STD_TORCH_CHECK(
          active_kernels().top_k_cut(
              logits + set * count, count, count - dropped, &cuts[static_cast<size_t>(set)],
              torch_runner()),
          "logits must not hold NaN");
    }
    const int64_t number = static_cast<int64_t>(size_);
    of_tensor_[size_++] = {number, cuts.data()};
    spec.cuts = of_tensor_;
    spec.cut_count = static_cast<int64_t>(size_);
    return number;
  }

 private:
  static constexpr size_t kMost = 8;  // parameters of one operation
  size_t size_ = 0;
  std::vector<Cut> cuts_[kMost];
  Cuts of_tensor_[kMost];
};

// n of every m weights, of a parameter with `inputs` in its dimension 1, `after` weights for each.
inline void keep_n_of_m(
    LogitLayout& layout,
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

// Which weights each logit covers, by the shapes of both and by (n, m), which may be empty. Keeps
// what `layout` points into.
class Layout {
 public:
  // `sets` comes out as the number of sets.
  Layout(
      const Tensor& weight,
      const Tensor& logits,
      const std::vector<int64_t>& n_of_m,
      const EstimatorArguments& estimator,
      int64_t& sets) {
    const int64_t dims = weight.dim(), extra = logits.dim() - dims;
    STD_TORCH_CHECK(
        extra == 0 || (extra == 1 && logits.size(0) > 0),
        "logits must have the dimensions of weight, or sets before them");
    sets = extra == 1 ? logits.size(0) : 1;
    std::vector<int64_t> small(dims);
    bool same = true;
    int64_t row = 1;
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t size = weight.size(d);
      small[d] = logits.size(d + extra);
      STD_TORCH_CHECK(
          small[d] == size || (small[d] > 0 && size % small[d] == 0),
          "logits must have the shape of weight, or divide it in every dimension");
      same = same && small[d] == size;
      row *= d > 0 ? size : 1;
    }
    if (!n_of_m.empty()) {
      STD_TORCH_CHECK(same, "n_of_m needs logits like weight");
      const int64_t inputs = weight.size(1);
      keep_n_of_m(layout, n_of_m, inputs, inputs > 0 ? row / inputs : 1, estimator);
      if (weight.numel() == 0) {  // there is no row to draw
        layout = {};
      }
    }
    if (same || weight.numel() == 0) {
      return;
    }
    columns_.resize(row);
    layout.rows = weight.size(0) / small[0];
    layout.width = 1;
    for (int64_t d = dims - 1, step = 1; d > 0; step *= weight.size(d--)) {
      const int64_t size = weight.size(d), block = size / small[d];
      for (int64_t i = 0; i < row; ++i) {
        columns_[i] += static_cast<int32_t>(i / step % size / block * layout.width);
      }
      layout.width *= small[d];
    }
    layout.columns = columns_.data();
  }

  LogitLayout layout{};

 private:
  std::vector<int32_t> columns_;
};

// The results of a backward operation; those that nobody needs are empty.
class GradientTensors {
 public:
  GradientTensors(
      const Tensor& x,
      const Tensor& weight,
      const Tensor& logits,
      const std::optional<Tensor>& bias,
      const std::optional<Tensor>& bias_logits,
      bool need_x,
      bool need_weight,
      bool need_logits,
      bool need_bias,
      bool need_bias_logits)
      : dx_(like(x, need_x)),
        dweight_(like(weight, need_weight)),
        dlogits_(like(logits, need_logits)),
        dbias_(like(bias.value_or(weight), need_bias)),
        dbias_logits_(like(bias_logits.value_or(logits), need_bias_logits)),
        no_weight_(weight.numel() == 0) {
    if (no_weight_) {  // yet there may be logits
      torch::stable::zero_(dlogits_);
    }
  }

  void zero() {
    for (Tensor* t : {&dx_, &dweight_, &dlogits_, &dbias_, &dbias_logits_}) {
      torch::stable::zero_(*t);
    }
  }

  Gradients pointers(const void* dy) {
    const auto pointer = [](Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
    Gradients d{};
    d.dy = dy;
    d.dx = pointer(dx_);
    d.dweight = pointer(dweight_);
    d.dlogits = no_weight_ ? nullptr : static_cast<float*>(pointer(dlogits_));
    d.dbias = pointer(dbias_);
    d.dbias_logits = static_cast<float*>(pointer(dbias_logits_));
    return d;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {dx_, dweight_, dlogits_, dbias_, dbias_logits_};
  }

 private:
  static Tensor like(const Tensor& t, bool needed) {
    static constexpr int64_t kNone[] = {0};
    return empty_like(t, needed ? t.sizes() : torch::headeronly::IntHeaderOnlyArrayRef(kNone));
  }

  Tensor dx_, dweight_, dlogits_, dbias_, dbias_logits_;
  bool no_weight_;
};

}  // namespace modmask
