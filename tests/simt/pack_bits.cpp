// Bits of a bool mask.
#include "call.h"

#include "cuda/pack_bits.cuh"

using namespace modmask::cuda;

KERNEL(pack_bits) {
  const PackBits p{
      call.pointer<const uint8_t>("mask"), call.integer("count"), call.pointer<uint8_t>("bits")};
  LaunchShape shape = pack_bits_shape(p.count);
  shape.grid.x = static_cast<unsigned>(call.integer("blocks", shape.grid.x));
  call.launch(shape, [&] { pack_bits(p); });
}

// Bits of a mask [masks, ...] from one that divides it in every dimension.
KERNEL(expand_bits) {
  const auto* whole = call.pointer<const int64_t>("whole");
  const auto* small = call.pointer<const int64_t>("small");
  BlockSizes sizes{};
  for (int d = 0; d < 4; ++d) {
    sizes.whole[d] = whole[d];
    sizes.small[d] = small[d];
  }
  const ExpandBits p = expand_params(
      sizes, call.pointer<const uint8_t>("from"), call.integer("from_stride"),
      call.pointer<uint8_t>("to"), call.integer("to_stride"));
  call.launch(expand_shape(p, call.integer("masks")), [&] { expand_bits(p); });
}
