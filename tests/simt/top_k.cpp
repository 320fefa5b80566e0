// The k largest over many tensors: scores and masks are one array each, cut by `counts`.
#include "call.h"

#include "cuda/top_k.cuh"

using namespace modmask::cuda;

namespace {

template <typename T>
void top_k(const Call& call) {
  auto* scores = call.pointer<T>("scores");
  auto* mask = call.pointer<uint8_t>("mask");
  const auto* counts = call.pointer<const int64_t>("counts");
  TopKParams p{};
  p.count = call.size("counts");
  p.k = call.integer("k");
  p.largest = call.integer("largest") != 0;
  p.packed = call.integer("packed") != 0;
  std::vector<TopKTensor> tensors;
  for (int64_t t = 0; t < p.count; ++t) {
    tensors.push_back({scores, mask, counts[t], p.units});
    p.units += top_k_units(counts[t]);
    scores += counts[t];
    if (mask != nullptr) {
      mask += p.packed ? (counts[t] + 7) / 8 : counts[t];
    }
  }
  TopKWorkspace workspace;
  memset(static_cast<void*>(&workspace), 0xFF, sizeof workspace);
  std::vector<TopKTensor> listed(tensors.size());
  call.device.buffer("tensors", listed.data(), listed.size() * sizeof(TopKTensor), 8);
  call.device.buffer("workspace", &workspace, sizeof workspace, 4);
  p.tensors = listed.data();
  p.workspace = &workspace;
  p.cut = call.pointer<modmask::Cut>("cut");
  if (p.cut != nullptr) {  // threads write its parts
    call.device.buffer("cut", p.cut, sizeof *p.cut, 4);
  }
  LaunchShape shape = top_k_shape(p);
  shape.grid.x = static_cast<unsigned>(call.integer("blocks", shape.grid.x));
  for (size_t t = 0; t < tensors.size(); t += kTopKListed) {
    TopKList list{};
    for (; list.count < kTopKListed && t + list.count < tensors.size(); ++list.count) {
      list.tensors[list.count] = tensors[t + list.count];
    }
    list.to = listed.data() + t;
    call.launch(top_k_list_shape(), [&] { top_k_list(list); });
  }
  call.launch(top_k_single_shape(), [&] { top_k_start(p); });
  for (int digit = 0; digit < 3; ++digit) {
    call.launch(shape, [&] { top_k_count<T>(p); });
    call.launch(top_k_single_shape(), [&] { top_k_digit(p); });
  }
  call.launch(shape, [&] { top_k_ties<T>(p); });
  call.launch(top_k_single_shape(), [&] { top_k_ranks(p); });
  if (p.cut != nullptr) {
    call.launch(shape, [&] { top_k_cut(p); });
  } else {
    call.launch(shape, [&] { top_k_write<T>(p); });
  }
  *call.pointer<uint32_t>("nan") = workspace.state.nan;
}

}  // namespace

KERNEL(top_k) {
  call.with_dtype("dtype", [&](auto t) { top_k<decltype(t)>(call); });
}
