// Shared by the CPU bindings of all operations: operands and the choice of the capability.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace modmask {

// The table in use: the best one that this CPU supports, unless another one was asked for.
const Kernels& active_kernels();

// Names of the supported capabilities, best first.
const char* const* supported_capabilities(int& count);

// Returns false for an unknown or unsupported name.
bool choose_capability(const char* name);

// torch's own thread pool.
Runner torch_runner();

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

inline MaskSpec mask_spec(
    const std::optional<Tensor>& seed,
    const Contiguous& seed_data,
    int64_t sets,
    const Draw& draw) {
  MaskSpec spec =
      drawn_masks<MaskSpec>(seed, static_cast<const int64_t*>(seed_data.data()), sets, draw);
  spec.hard = draw.hard;
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
    const int64_t kept = kept_by_top_k(estimator, spec.element_offset, count);
    std::vector<Cut>& cuts = cuts_[size_];
    cuts.resize(static_cast<size_t>(spec.sets));
    for (int64_t set = 0; set < spec.sets; ++set) {
      if (shared && set > 0) {
        cuts[static_cast<size_t>(set)] = cuts[0];
        continue;
      }
      STD_TORCH_CHECK(
          active_kernels().top_k_cut(
              logits + set * count, count, kept, &cuts[static_cast<size_t>(set)], torch_runner()),
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

// Which weights each logit covers, by the shapes of both and by (n, m), which may be empty. Keeps
// what `layout` points into.
class Layout {
 public:
  // `sets` comes out as the number of sets.
  Layout(
      const Tensor& weight,
      const Tensor& logits,
      const Draw& draw,
      const std::vector<int64_t>& n_of_m,
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
      keep_n_of_m(layout, n_of_m, inputs, inputs > 0 ? row / inputs : 1, draw.estimator);
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

// What every masked product checks, and the contiguous copies that its problem points into.
struct ProductArguments {
  Contiguous x, weight, logits, bias, bias_logits, seed;
  CutStore cuts;
  int64_t sets;
  Layout layout;

  ProductArguments(const Operands& o, const Draw& draw, const std::vector<int64_t>& n_of_m)
      : x(o.x),
        weight(o.weight),
        logits(o.logits, are_shared(o.logits, o.weight.dim() + 1)),
        bias(o.bias),
        bias_logits(o.bias_logits),
        seed(o.seed),
        layout(o.weight, o.logits, draw, n_of_m, sets) {
    check_float32(o.logits, "logits");
    check_same_type(o.weight, o.x, "weight");
  }

  // Masks and pointers of the problem; the number of its groups.
  template <typename Problem>
  int64_t complete(Problem& problem, const Operands& o, const Draw& draw, int64_t outputs) {
    if (o.bias.has_value()) {
      check_same_type(*o.bias, o.x, "bias");
      STD_TORCH_CHECK(o.bias->dim() == 1 && o.bias->size(0) == outputs, "bias must be [out]");
    }
    if (o.bias_logits.has_value()) {
      check_float32(*o.bias_logits, "bias_logits");
      STD_TORCH_CHECK(
          o.bias.has_value() && o.bias_logits->dim() >= 1 && o.bias_logits->dim() <= 2 &&
              o.bias_logits->size(-1) == outputs && o.bias_logits->numel() == sets * outputs,
          "bias_logits must be [out] or [sets, out] and come with a bias");
    }
    MaskSpec& mask = problem.mask;
    mask = mask_spec(o.seed, seed, sets, draw);
    mask.shared = are_shared(o.logits, o.weight.dim() + 1);
    mask.tensor_id = cuts.add(
        mask, draw.estimator, draw.tensor_id, logits.floats(), o.logits.numel() / sets,
        mask.shared);
    problem.bias_tensor_id =
        cuts.add(mask, draw.estimator, draw.bias_tensor_id, bias_logits.floats(), outputs);
    mask.layout = layout.layout;
    const int64_t groups = sets * mask.samples;
    STD_TORCH_CHECK(
        groups > 0 && o.x.size(0) % groups == 0,
        "the batch of x does not divide into sets * samples groups");
    problem.x = x.data();
    problem.weight = weight.data();
    problem.logits = logits.floats();
    problem.bias = bias.data();
    problem.bias_logits = bias_logits.floats();
    return groups;
  }
};

// The results of a backward operation; those that nobody needs are empty.
class GradientTensors {
 public:
  GradientTensors(const Operands& of, const Needs& need)
      : dx_(like(of.x, need.x)),
        dweight_(like(of.weight, need.weight)),
        dlogits_(like(of.logits, need.logits)),
        dbias_(like(of.bias.value_or(of.weight), need.bias)),
        dbias_logits_(like(of.bias_logits.value_or(of.logits), need.bias_logits)),
        no_weight_(of.weight.numel() == 0) {
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
