#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "../common/decision.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// The standard headers above stay at the baseline, so that no inline function of theirs is emitted
// with instructions that another machine lacks.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define MODMASK_AVX512  // the pragma does not define the usual macros
#define MODMASK_CAPABILITY avx512
#define MODMASK_LANES 16
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

const Kernels kKernelsAvx512 = avx512::table("avx512");

}  // namespace modmask

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
