#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "../common/decision.h"
#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define MODMASK_CAPABILITY plain
#define MODMASK_LANES 4
#include "simd.h"

#include "noise.h"
#include "storage.h"
#include "product.h"
#include "mask_rows.h"
#include "granular_rows.h"
#include "masked_linear_kernels.h"
#include "masked_conv_kernels.h"
#include "depthwise_kernels.h"
#include "select_kernels.h"
#include "masked_rnn_kernels.h"
#include "sample_mask_kernels.h"
#include "top_k_kernels.h"
#include "capability.h"

namespace modmask {

const Kernels kKernelsPlain = plain::table("plain");

}  // namespace modmask
