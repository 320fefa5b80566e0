// modmask::pack_bits_cuda. The schema lives in Python.

#include "bindings.h"

namespace modmask::cuda {

namespace {

Tensor pack_bits(Tensor mask) {
  const Place place(mask);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool");
  const Operand data(place, mask, "mask");
  const int64_t count = mask.numel();
  Tensor bits = torch::stable::new_empty(mask, {(count + 7) / 8}, ScalarType::Byte);
  if (count > 0) {
    launch_pack_bits(data.data<uint8_t>(), count, results<uint8_t>(bits), place.stream());
  }
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  MODMASK_IMPL(m, "pack_bits_cuda", pack_bits);
}

}  // namespace modmask::cuda
