// Shared by the CUDA bindings of all operations: where they run, and checks of operands.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>

#include "../arguments.h"
#include "launch.h"

namespace modmask::cuda {

// The device of a tensor, made the current one, and torch's current stream there.
class Place {
 public:
  explicit Place(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    check(t, "the first operand");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<Stream>(stream);
  }

  Stream stream() const {
    return stream_;
  }

  // Refuses a tensor that lies elsewhere.
  void check(const Tensor& t, const char* name) const {
    int32_t device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
    STD_TORCH_CHECK(
        device == aoti_torch_device_type_cuda() && t.get_device_index() == index_, name,
        " must be on cuda:", index_, " like the other operands");
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

// Keeps an operand alive as the kernels read it, contiguous and at a multiple of 16 bytes.
class Operand {
 public:
  // `as_it_is`: of a tensor whose values lie as they should.
  Operand(
      const Place& place, const std::optional<Tensor>& t, const char* name, bool as_it_is = false)
      : tensor_(t) {
    if (!t.has_value()) {
      return;
    }
    place.check(*t, name);
    if (!as_it_is) {
      tensor_ = torch::stable::contiguous(*t);
    }
    if (!as_it_is && reinterpret_cast<uintptr_t>(data<void>()) % 16 != 0) {
      tensor_ = torch::stable::clone(*tensor_);
    }
  }

  // Null where the operand is absent.
  template <typename T>
  const T* data() const {
    return tensor_.has_value() ? static_cast<const T*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> tensor_;
};

inline ElementType element_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

template <typename T>
T* results(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Keeps where the masks of top_k end, of every set, as the kernels read it; of other estimators
// nothing. `mask` has its sets, and comes to know them.
class Cuts {
 public:
  Cuts() = default;
  Cuts(
      const Place& place,
      MaskParams& mask,
      const EstimatorArguments& estimator,
      const Tensor& like,
      const float* logits,
      int64_t count) {
    if (mask.estimator != Estimator::kTopK || logits == nullptr || count * mask.sets == 0) {
      return;
    }
    const int64_t kept = kept_by_top_k(estimator, mask.element_offset, count);
    const auto words = [&](int64_t bytes) {
      return torch::stable::new_empty(like, {bytes / 8}, ScalarType::Long);
    };
    Tensor list = words(top_k_list_bytes(1)), workspace = words(top_k_workspace_bytes());
    cuts_ = words(static_cast<int64_t>(sizeof(Cut)) * mask.sets);
    mask.cuts = results<Cut>(*cuts_);
    launch_top_k_cuts(
        logits, mask.sets, mask.shared, count, kept, results<Cut>(*cuts_), results<void>(list),
        results<void>(workspace), place.stream());
  }

 private:
  std::optional<Tensor> cuts_;
};

}  // namespace modmask::cuda
