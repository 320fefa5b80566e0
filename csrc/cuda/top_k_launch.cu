#include <cstddef>

#include "launch.cuh"
#include "top_k.cuh"

namespace modmask::cuda {

static_assert(offsetof(TopKWorkspace, state) + offsetof(TopKState, nan) == kTopKNan);

namespace {

// All but what is written in the end.
template <typename T>
void launch_search(const TopKParams& p, Stream stream) {
  const LaunchShape shape = top_k_shape(p), single = top_k_single_shape();
  launch("top_k_start", top_k_start, single, p, stream);
  for (int digit = 0; digit < 3; ++digit) {
    launch("top_k_count", top_k_count<T>, shape, p, stream);
    launch("top_k_digit", top_k_digit, single, p, stream);
  }
  launch("top_k_ties", top_k_ties<T>, shape, p, stream);
  launch("top_k_ranks", top_k_ranks, single, p, stream);
}

template <typename T>
void launch_all(const TopKParams& p, Stream stream) {
  launch_search<T>(p, stream);
  launch("top_k_write", top_k_write<T>, top_k_shape(p), p, stream);
}

}  // namespace

int64_t top_k_list_bytes(int64_t tensors) {
  return tensors * static_cast<int64_t>(sizeof(TopKTensor));
}

int64_t top_k_workspace_bytes() {
  return sizeof(TopKWorkspace);
}

void launch_top_k(
    ElementType type,
    const TopKScores* tensors,
    int64_t count,
    int64_t k,
    bool largest,
    bool packed,
    void* list,
    void* workspace,
    Stream stream) {
  TopKParams p{};
  p.tensors = static_cast<const TopKTensor*>(list);
  p.count = count;
  p.k = k;
  p.largest = largest;
  p.packed = packed;
  p.workspace = static_cast<TopKWorkspace*>(workspace);
  for (int64_t t = 0; t < count;) {
    TopKList listed{};
    listed.to = static_cast<TopKTensor*>(list) + t;
    for (; listed.count < kTopKListed && t < count; ++listed.count, ++t) {
      listed.tensors[listed.count] = {
          tensors[t].scores, tensors[t].mask, tensors[t].count, p.units};
      p.units += top_k_units(tensors[t].count);
    }
    launch("top_k_list", top_k_list, top_k_list_shape(), listed, stream);
  }
  switch (type) {
    case ElementType::kFloat32:
      return launch_all<float>(p, stream);
    case ElementType::kBFloat16:
      return launch_all<__nv_bfloat16>(p, stream);
    case ElementType::kFloat16:
      return launch_all<__half>(p, stream);
  }
}

void launch_top_k_cuts(
    const float* logits,
    int64_t sets,
    bool shared,
    int64_t count,
    int64_t k,
    Cut* cuts,
    void* list,
    void* workspace,
    Stream stream) {
  for (int64_t set = 0; set < sets; ++set) {
    TopKList listed{};
    listed.count = 1;
    listed.tensors[0] = {logits + (shared ? 0 : set * count), nullptr, count, 0};
    listed.to = static_cast<TopKTensor*>(list);
    launch("top_k_list", top_k_list, top_k_list_shape(), listed, stream);
    TopKParams p{};
    p.tensors = listed.to;
    p.count = 1;
    p.units = top_k_units(count);
    p.k = k;
    p.largest = true;
    p.workspace = static_cast<TopKWorkspace*>(workspace);
    p.cut = cuts + set;
    launch_search<float>(p, stream);
    launch("top_k_cut", top_k_cut, top_k_shape(p), p, stream);
  }
}

}  // namespace modmask::cuda
