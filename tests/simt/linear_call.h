// Masked products as the launchers run them.
#pragma once

#include "call.h"

#include "cuda/masked_linear.cuh"

template <modmask::cuda::MaskMode kMode, bool kSoft, int kRows>
void run_product(const Call& call, const modmask::cuda::LinearParams& p) {
  call.launch(p.plan.shape, [&] {
    p.plan.backward ? modmask::cuda::masked_linear_dx<kMode, kSoft, kRows>(p)
                    : modmask::cuda::masked_linear_forward<kMode, kSoft, kRows>(p);
  });
}

template <modmask::cuda::MaskMode kMode>
void run_hard_product(const Call& call, const modmask::cuda::LinearParams& p) {
  switch (p.plan.job_rows) {
    case 1:
      return run_product<kMode, false, 1>(call, p);
    case 4:
      return run_product<kMode, false, 4>(call, p);
    default:
      return run_product<kMode, false, 8>(call, p);
  }
}
