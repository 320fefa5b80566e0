// Kernels that test simt.h itself: right ones, and ones with one mistake each.
#include "call.h"

#include <algorithm>

#include "cuda/device.cuh"

using namespace modmask::cuda;

namespace {

// Reverses each block's part of x through shared memory.
__global__ void reverse(const float* x, float* y, bool barrier) {
  MODMASK_SHARED(float, tile, 128);
  const int i = threadIdx.x;
  tile[i] = load(x + blockIdx.x * blockDim.x + i);
  if (barrier) {
    __syncthreads();
  }
  store(y + blockIdx.x * blockDim.x + i, static_cast<float>(tile[blockDim.x - 1 - i]));
}

// The sum of each block's part of x: shuffles within warps, dynamic shared memory between them.
__global__ void block_sums(const float* x, int n, float* sums) {
  MODMASK_DYNAMIC_SHARED(memory);
  const auto partial = shared_cast<float>(memory);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = i < n ? load(x + i) : 0.0f;
  for (int by = 16; by > 0; by >>= 1) {
    v += __shfl_xor_sync(kAllLanes, v, by);
  }
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = v;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) {
      total += partial[w];
    }
    store(sums + blockIdx.x, total);
  }
}

// Every warp operation, one word per thread and operation.
__global__ void warp_operations(uint32_t* out) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t results[] = {
      __ballot_sync(kAllLanes, lane % 3 == 0),
      static_cast<uint32_t>(__any_sync(kAllLanes, lane == 7)),
      static_cast<uint32_t>(__all_sync(kAllLanes, lane != 7)),
      __shfl_sync(kAllLanes, lane * 10, 5),
      __shfl_sync(kAllLanes, lane * 10, 5, 8),
      __shfl_xor_sync(kAllLanes, lane, 3),
      __shfl_up_sync(kAllLanes, lane, 4u),
      __shfl_down_sync(kAllLanes, lane, 4u, 16),
      static_cast<uint32_t>(__syncthreads_count(lane < 5)),
      static_cast<uint32_t>(__syncthreads_or(threadIdx.x == 40)),
      static_cast<uint32_t>(__syncthreads_and(threadIdx.x < 64)),
      static_cast<uint32_t>(__popc(lane)),
      static_cast<uint32_t>(__ffs(static_cast<int>(lane))),
      static_cast<uint32_t>(__clz(static_cast<int>(lane))),
      __umulhi(lane << 28, 0xD2511F53u),
      __brev(lane),
  };
  constexpr int kCount = sizeof results / sizeof results[0];
  for (int i = 0; i < kCount; ++i) {
    store(out + threadIdx.x * kCount + i, results[i]);
  }
}

__global__ void atomics(int* counts, unsigned long long* total, float* sum, uint32_t* bits) {
  MODMASK_SHARED(int, inside, 1);
  if (threadIdx.x == 0) {
    inside[0] = 0;
  }
  __syncthreads();
  atomicAdd(&inside[0], 1);
  atomicAdd(total, static_cast<unsigned long long>(threadIdx.x));
  atomicAdd(sum, 0.5f);
  atomicOr(bits, 1u << (threadIdx.x % 32));
  atomicMax(bits + 1, threadIdx.x);
  atomicCAS(bits + 2, 0u, blockIdx.x + 1);
  atomicExch(bits + 3, 9u);
  atomicMin(bits + 4, threadIdx.x + 3);
  __syncthreads();
  if (threadIdx.x == 0) {
    store(counts + blockIdx.x, static_cast<int>(inside[0]));
  }
}

// Copies with loads of kCount elements.
template <int kCount>
__global__ void copy(const float* x, float* y, int n) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kCount;
  if (i + kCount <= n) {
    store_vector<kCount>(y + i, load_vector<kCount>(x + i));
  }
}

// Blocks that wait for each other: each adds what the block before it wrote.
__global__ void chain(float* values, unsigned* turn) {
  if (threadIdx.x == 0) {
    while (atomicAdd(turn, 0u) != blockIdx.x) {
      __nanosleep(20);
    }
    atomicAdd(values + blockIdx.x, blockIdx.x == 0 ? 1.0f : 2.0f);
    __threadfence();
    atomicAdd(turn, 1u);
  }
}

enum class Mistake {
  kRacingWrites,
  kRacingRead,
  kWarpRace,
  kGlobalRace,
  kUnwritten,
  kPastStatic,
  kPastDynamic,
  kPastGlobal,
  kMisaligned,
  kExitBeforeBarrier,
  kDifferentBarriers,
  kMissingLane,
  kOtherLane,
  kEndlessWait,
  kNone,
};
const char* const kMistakes[] = {
    "racing writes",      "racing read",  "warp race",   "global race",  "unwritten",
    "past static",        "past dynamic", "past global", "misaligned",   "exit before barrier",
    "different barriers", "missing lane", "other lane",  "endless wait",
};

__global__ void mistaken(Mistake which, const float* x, float* y) {
  MODMASK_SHARED(float, tile, 64);
  MODMASK_DYNAMIC_SHARED(memory);
  const auto more = shared_cast<float>(memory);
  const int i = threadIdx.x;
  const auto is = [=](Mistake m) { return which == m; };
  tile[is(Mistake::kRacingWrites) ? i / 2 : i] = static_cast<float>(i);  // racing writes
  if (is(Mistake::kRacingRead)) {
    store(y + i, static_cast<float>(tile[63 - i]));  // racing read
  }
  if (is(Mistake::kWarpRace)) {  // right between lanes of a warp, wrong between warps
    __syncwarp();
    store(y + i, static_cast<float>(tile[i ^ 1]));
    store(y + i, static_cast<float>(tile[i ^ 32]));  // warp race
  }
  if (is(Mistake::kUnwritten)) {
    store(y + i, static_cast<float>(more[i]));  // unwritten
  }
  if (is(Mistake::kPastStatic)) {
    tile[i + 1] = 0.0f;  // past static
  }
  if (is(Mistake::kPastDynamic)) {
    more[i + 1] = 0.0f;  // past dynamic
  }
  if (is(Mistake::kPastGlobal)) {
    store(y + i, load(x + i + 1));  // past global
  }
  if (is(Mistake::kMisaligned)) {
    store(y + i, load_vector<2>(x + i % 32).v[0]);  // misaligned
  }
  if (is(Mistake::kGlobalRace)) {
    store(y + i / 2, 1.0f);  // global race
  }
  if (is(Mistake::kExitBeforeBarrier) && i >= 40) {
    return;
  }
  if (is(Mistake::kDifferentBarriers) && i % 2 == 0) {
    __syncthreads();  // one barrier
  } else {
    __syncthreads();  // the other barrier
  }
  if (is(Mistake::kMissingLane) && i != 3) {
    store(y + i, static_cast<float>(__ballot_sync(kAllLanes, 1)));  // missing lane
    return;
  }
  if (is(Mistake::kMissingLane)) {
    __syncwarp();
  }
  if (is(Mistake::kOtherLane) && i < 8) {
    store(y + i, __shfl_sync(0xFFu, 1.0f, 9));  // other lane
  }
  while (is(Mistake::kEndlessWait)) {
    __nanosleep(20);  // endless wait
  }
}

// Around the checks of device.cuh: only AddressSanitizer sees these.
__global__ void unchecked(const float* x, float* y, bool shared) {
  MODMASK_SHARED(float, tile, 64);
  tile[threadIdx.x] = 1.0f;
  const auto mine = tile + threadIdx.x;
  const float* from =
      shared ? mine.at(1, 4, simt::Access::kRead, simt::Place::here()) : x + threadIdx.x;
  store(y + threadIdx.x, from[1]);
}

}  // namespace

KERNEL(reverse) {
  const auto* x = call.pointer<float>("x");
  auto* y = call.pointer<float>("y");
  const auto block = static_cast<unsigned>(call.integer("block"));
  const bool barrier = call.integer("barrier") != 0;
  call.launch(LaunchShape{static_cast<unsigned>(call.size("x")) / block, block}, [&] {
    reverse(x, y, barrier);
  });
}

KERNEL(block_sums) {
  const auto* x = call.pointer<float>("x");
  auto* sums = call.pointer<float>("sums");
  const auto block = static_cast<unsigned>(call.integer("block"));
  call.launch(LaunchShape{static_cast<unsigned>(call.size("sums")), block, block / 8}, [&] {
    block_sums(x, static_cast<int>(call.size("x")), sums);
  });
}

KERNEL(warp_operations) {
  auto* out = call.pointer<uint32_t>("out");
  call.launch(LaunchShape{1, 64}, [&] { warp_operations(out); });
}

KERNEL(atomics) {
  auto* counts = call.pointer<int>("counts");
  auto* total = call.pointer<unsigned long long>("total");
  auto* sum = call.pointer<float>("sum");
  auto* bits = call.pointer<uint32_t>("bits");
  call.launch(LaunchShape{static_cast<unsigned>(call.size("counts")), 64}, [&] {
    atomics(counts, total, sum, bits);
  });
}

KERNEL(copy) {
  const auto* x = call.pointer<float>("x");
  auto* y = call.pointer<float>("y");
  const auto n = static_cast<int>(call.size("x"));
  call.launch(LaunchShape{static_cast<unsigned>(n + 127) / 128, 128}, [&] {
    call.integer("vector") == 4 ? copy<4>(x, y, n) : copy<1>(x, y, n);
  });
}

KERNEL(chain) {
  auto* values = call.pointer<float>("values");
  auto* turn = call.pointer<unsigned>("turn");
  call.launch(
      LaunchShape{static_cast<unsigned>(call.size("values")), 32}, [&] { chain(values, turn); },
      true);
}

KERNEL(mistaken) {
  const auto* x = call.pointer<float>("x");
  auto* y = call.pointer<float>("y");
  const std::string name = call.text("mistake");
  const auto* which = std::find(std::begin(kMistakes), std::end(kMistakes), name);
  call.launch(LaunchShape{1, 64, 256}, [&] {
    mistaken(static_cast<Mistake>(which - std::begin(kMistakes)), x, y);
  });
}

KERNEL(unchecked) {
  const auto* x = call.pointer<float>("x");
  auto* y = call.pointer<float>("y");
  call.launch(LaunchShape{1, 64}, [&] { unchecked(x, y, call.integer("shared") != 0); });
}

// Rounds x to a 16-bit type and back.
KERNEL(convert) {
  const auto* x = call.pointer<float>("x");
  auto* y = call.pointer<float>("y");
  auto* bits = call.pointer<uint16_t>("bits");
  call.with_dtype("dtype", [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same<T, float>::value) {
      for (int64_t i = 0; i < call.size("x"); ++i) {
        const T v = from_float<T>(x[i]);
        bits[i] = v.bits;
        y[i] = to_float(v);
      }
    }
  });
}
