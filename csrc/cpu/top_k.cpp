// modmask::top_k_mask on the CPU. The schema lives in Python.

#include <vector>

#include "bindings.h"

namespace modmask {

namespace {

std::vector<Tensor> top_k_mask(std::vector<Tensor> scores, int64_t k, bool largest, bool packed) {
  STD_TORCH_CHECK(!scores.empty(), "scores must not be empty");
  std::vector<Contiguous> data;
  std::vector<const void*> pointers;
  std::vector<int64_t> counts;
  std::vector<Tensor> masks;
  std::vector<uint8_t*> results;
  int64_t total = 0;
  for (const Tensor& t : scores) {
    check_same_type(t, scores[0], "every tensor of scores");
    data.emplace_back(t);
    pointers.push_back(data.back().data());
    counts.push_back(t.numel());
    total += t.numel();
    const int64_t bytes[] = {(t.numel() + 7) / 8};
    masks.push_back(
        packed
            ? empty_as(
                  aoti_torch_dtype_uint8(), t, torch::headeronly::IntHeaderOnlyArrayRef(bytes, 1))
            : empty_as(aoti_torch_dtype_bool(), t, t.sizes()));
    results.push_back(static_cast<uint8_t*>(masks.back().mutable_data_ptr()));
  }
  STD_TORCH_CHECK(k >= 0 && k <= total, "k must be in [0, number of scores]");
  TopKProblem p{};
  p.scores = pointers.data();
  p.counts = counts.data();
  p.tensors = static_cast<int64_t>(scores.size());
  p.dtype = element_type(scores[0]);
  p.k = k;
  p.largest = largest;
  p.packed = packed;
  STD_TORCH_CHECK(
      active_kernels().top_k(p, results.data(), torch_runner()), "scores must not hold NaN");
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CPU, m) {
  MODMASK_IMPL(m, "top_k_mask", top_k_mask);
}

}  // namespace modmask
