// Shared by the bindings of all operations: argument checks and the choice of the capability.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
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

// Contiguous and uninitialised, with the dtype of `like`. Straight from the allocator: an operation
// looked up by name costs several microseconds.
inline Tensor empty_like(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t dtype, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle created;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device,
      like.get_device_index(), &created));
  return Tensor(created);
}

// Keeps a contiguous copy alive for as long as its pointer is used.
class Contiguous {
 public:
  explicit Contiguous(const std::optional<Tensor>& t) : tensor_(t) {
    if (t.has_value() && !t->is_contiguous()) {
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

// `seed` is int64, of shape [] or [sets], or absent for the threshold mask.
inline MaskSpec mask_spec(
    const std::optional<Tensor>& seed,
    const Contiguous& seed_data,
    int64_t sets,
    int64_t samples,
    int64_t tensor_id,
    int64_t sample_offset,
    int64_t element_offset,
    double tau,
    bool hard) {
  MaskSpec spec{};
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed must be int64");
    STD_TORCH_CHECK(
        seed->dim() == 0 || (seed->dim() == 1 && seed->size(0) == sets),
        "seed must have shape [] or [sets] with sets = ", sets);
    spec.seeds = static_cast<const int64_t*>(seed_data.data());
    spec.seed_stride = seed->dim();
  }
  spec.sets = sets;
  spec.samples = seed.has_value() ? samples : 1;
  spec.sample_offset = sample_offset;
  spec.element_offset = element_offset;
  spec.tensor_id = tensor_id;
  spec.tau = static_cast<float>(tau);
  spec.hard = hard;
  return spec;
}

}  // namespace modmask
