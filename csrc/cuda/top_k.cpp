// modmask::top_k_mask_cuda. The schema lives in Python.

#include <vector>

#include "bindings.h"

namespace modmask::cuda {

namespace {

// The masks, and one word more, which is not 0 if a score is NaN.
std::vector<Tensor> top_k_mask(std::vector<Tensor> scores, int64_t k, bool largest, bool packed) {
  STD_TORCH_CHECK(!scores.empty(), "scores must not be empty");
  const Place place(scores[0]);
  const ElementType type = element_type(scores[0], "scores");
  std::vector<Operand> data;
  std::vector<TopKScores> tensors;
  std::vector<Tensor> found;
  int64_t total = 0;
  for (const Tensor& t : scores) {
    check_same_type(t, scores[0], "every tensor of scores");
    data.emplace_back(place, t, "every tensor of scores");
    const int64_t bytes[] = {(t.numel() + 7) / 8};
    found.push_back(
        packed
            ? empty_as(
                  aoti_torch_dtype_uint8(), t, torch::headeronly::IntHeaderOnlyArrayRef(bytes, 1))
            : empty_as(aoti_torch_dtype_bool(), t, t.sizes()));
    tensors.push_back({data.back().data<void>(), t.numel(), results<uint8_t>(found.back())});
    total += t.numel();
  }
  STD_TORCH_CHECK(k >= 0 && k <= total, "k must be in [0, number of scores]");
  const int64_t count = static_cast<int64_t>(scores.size());
  Tensor list =
      torch::stable::new_empty(scores[0], {top_k_list_bytes(count) / 8}, ScalarType::Long);
  Tensor workspace =
      torch::stable::new_zeros(scores[0], {top_k_workspace_bytes() / 4}, ScalarType::Int);
  if (total > 0) {
    launch_top_k(
        type, tensors.data(), count, k, largest, packed, results<void>(list),
        results<void>(workspace), place.stream());
  }
  found.push_back(torch::stable::narrow(workspace, 0, kTopKNan / 4, 1));
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  MODMASK_IMPL(m, "top_k_mask_cuda", top_k_mask);
}

}  // namespace modmask::cuda
