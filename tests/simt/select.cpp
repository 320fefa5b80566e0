// Products with the masks that every example selects.
#include "call.h"

#include "cuda/select.cuh"

using namespace modmask::cuda;

KERNEL(selected_product) {
  const bool convolution = call.integer("convolution") != 0;
  Selected p{};
  p.type = call.element_type("dtype");
  p.batch = call.integer("batch");
  p.sets = call.integer("sets");
  p.places = call.integer("places");
  p.tiles = call.integer("tiles");
  p.out = call.integer("out");
  p.depth = call.integer("depth");
  p.groups = call.integer("groups");
  p.x = call.typed("dtype", "x");
  p.weight = call.typed("dtype", "weight");
  p.bits = call.pointer<const uint8_t>("bits");
  p.bias = call.typed("dtype", "bias");
  p.bias_bits = call.pointer<const uint8_t>("bias_bits");
  p.order = call.pointer<const int64_t>("order");
  p.first_example = call.pointer<const int64_t>("first_example");
  p.first_tile = call.pointer<const int64_t>("first_tile");
  p.y = call.typed("dtype", "y");
  if (convolution) {
    const int64_t* sizes = call.pointer<const int64_t>("sizes");
    int* const to[] = {&p.channels,        &p.height,         &p.width,
                       &p.kernel_height,   &p.kernel_width,   &p.stride_height,
                       &p.stride_width,    &p.padding_height, &p.padding_width,
                       &p.dilation_height, &p.dilation_width, &p.out_width};
    for (size_t i = 0; i < sizeof to / sizeof *to; ++i) {
      *to[i] = static_cast<int>(sizes[i]);
    }
  }
  call.launch(selected_shape(p), [&] {
    convolution ? selected_product<true>(p) : selected_product<false>(p);
  });
}
