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
