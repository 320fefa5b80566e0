// modmask::select_linear and select_conv on the CPU. Schemas live in Python.

#include <cstring>
#include <vector>

#include "conv_geometry.h"

namespace modmask {

namespace {

// The elements of x along its first dimension, those of one set one after the other.
class SortedRows {
 public:
  // `rows_each`: rows of the problem per element
  SortedRows(const Tensor& x, const Tensor& row_sets, int64_t sets, int64_t rows_each)
      : x_(x), sorted_(x) {
    const int64_t batch = x.size(0);
    STD_TORCH_CHECK(
        row_sets.scalar_type() == ScalarType::Long && row_sets.dim() == 1 &&
            row_sets.size(0) == batch,
        "row_sets must be int64 [", batch, "], one set for each element of the batch of x");
    const Contiguous sets_data(row_sets);
    const int64_t* set_of = static_cast<const int64_t*>(sets_data.data());
    std::vector<int64_t> next(sets + 1);
    bool in_order = true;
    for (int64_t i = 0; i < batch; ++i) {
      STD_TORCH_CHECK(
          set_of[i] >= 0 && set_of[i] < sets, "row_sets must be at least 0 and below ", sets,
          ", the number of sets, but row ", i, " has ", set_of[i]);
      ++next[set_of[i] + 1];
      in_order = in_order && (i == 0 || set_of[i - 1] <= set_of[i]);
    }
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t last = (next[set] + next[set + 1]) * rows_each;
      for (int64_t row = next[set] * rows_each; row < last; row += kMostOfRun) {
        runs_.push_back({set, row, last - row < kMostOfRun ? last - row : kMostOfRun});
      }
      next[set + 1] += next[set];
    }
    places_.resize(batch * rows_each);
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t to = next[set_of[i]]++;
      for (int64_t r = 0; r < rows_each; ++r) {
        places_[to * rows_each + r] = i * rows_each + r;
      }
    }
    if (!in_order && x.numel() > 0) {
      sorted_ = gathered(x, rows_each);
    }
  }

  const void* data() const {
    return sorted_.data();
  }

  Selection selection(const SetBits& masks, const SetBits& bias_masks) const {
    return {masks, bias_masks, runs_.data(), static_cast<int64_t>(runs_.size()), places_.data()};
  }

 private:
  Contiguous gathered(const Tensor& x, int64_t rows_each) const {
    const int64_t batch = x.size(0);
    const size_t bytes = x.numel() / batch * (x.scalar_type() == ScalarType::Float ? 4 : 2);
    Tensor copy = empty_like(x, x.sizes());
    char* to = static_cast<char*>(copy.mutable_data_ptr());
    const char* from = static_cast<const char*>(x_.data());
    for (int64_t i = 0; i < batch; ++i) {
      std::memcpy(to + i * bytes, from + places_[i * rows_each] / rows_each * bytes, bytes);
    }
    return Contiguous(copy);
  }

  Contiguous x_, sorted_;
  std::vector<SetRun> runs_;
  std::vector<int64_t> places_;
};

// Masks of parameters of `count` elements; null where there are none.
SetBits set_bits(
    const std::optional<Tensor>& masks, const Contiguous& data, int64_t count, const char* name) {
  if (!masks.has_value()) {
    return {};
  }
  const int64_t bytes = (count + 7) / 8;
  STD_TORCH_CHECK(
      masks->scalar_type() == ScalarType::Byte && masks->dim() == 2 && masks->size(1) == bytes,
      name, " must be uint8 [sets, ", bytes, "]");
  return {static_cast<const uint8_t*>(data.data()), masks->size(0), bytes};
}

// What both operations check and hold.
struct SelectArguments {
  Contiguous weight, masks_data, bias, bias_masks_data;
  SetBits masks, bias_masks;

  SelectArguments(
      const Tensor& x,
      const Tensor& weight_,
      const Tensor& masks_,
      const std::optional<Tensor>& bias_,
      const std::optional<Tensor>& bias_masks_)
      : weight(weight_),
        masks_data(masks_),
        bias(bias_),
        bias_masks_data(bias_masks_),
        masks(set_bits(masks_, masks_data, weight_.numel(), "masks")),
        bias_masks(set_bits(bias_masks_, bias_masks_data, weight_.size(0), "bias_masks")) {
    check_same_type(weight_, x, "weight");
    if (bias_.has_value()) {
      check_same_type(*bias_, x, "bias");
      STD_TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == weight_.size(0), "bias must be [out]");
    }
    STD_TORCH_CHECK(
        !bias_masks_.has_value() || (bias_.has_value() && bias_masks.sets == masks.sets),
        "bias_masks must come with a bias and have as many sets as masks");
  }
};

Tensor select_linear(
    Tensor x,
    Tensor weight,
    Tensor masks,
    Tensor row_sets,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_masks) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [out, in]");
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(-1) == weight.size(1), "x must be [batch, ..., in]");
  const SelectArguments a(x, weight, masks, bias, bias_masks);
  std::vector<int64_t> shape;
  int64_t rows_each = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    rows_each *= d > 0 ? x.size(d) : 1;
  }
  shape.push_back(weight.size(0));
  const SortedRows sorted(x, row_sets, a.masks.sets, rows_each);
  Tensor y = empty_like(x, shape);
  if (y.numel() > 0) {
    LinearProblem p{};
    p.dtype = element_type(x);
    p.rows = x.size(0) * rows_each;
    p.in = weight.size(1);
    p.out = weight.size(0);
    p.x = sorted.data();
    p.weight = a.weight.data();
    p.bias = a.bias.data();
    active_kernels().select_linear(
        p, sorted.selection(a.masks, a.bias_masks), y.mutable_data_ptr(), torch_runner());
  }
  return y;
}

Tensor select_conv(
    Tensor x,
    Tensor weight,
    Tensor masks,
    Tensor row_sets,
    std::optional<Tensor> bias,
    std::optional<Tensor> bias_masks,
    const Window& window) {
  ConvProblem p = conv_geometry(x, weight, window);
  const SelectArguments a(x, weight, masks, bias, bias_masks);
  const SortedRows sorted(x, row_sets, a.masks.sets, 1);
  Tensor y = empty_like(x, conv_sizes(x, p));
  if (y.numel() > 0) {
    p.x = sorted.data();
    p.weight = a.weight.data();
    p.bias = a.bias.data();
    active_kernels().select_conv(
        p, sorted.selection(a.masks, a.bias_masks), y.mutable_data_ptr(), torch_runner());
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  MODMASK_IMPL(m, "select_linear", select_linear);
  MODMASK_IMPL(m, "select_conv", select_conv);
}

}  // namespace modmask
