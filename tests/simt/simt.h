// Runs CUDA kernels on the CPU: one fiber per thread of a block, switched at barriers and warp
// operations only, in an order drawn anew from a seed each time. What it reports instead of running
// on: races, reads of shared memory that nobody wrote, addresses outside of every buffer or
// misaligned, barriers that not all threads reach. It also counts the traffic of each buffer.
//
// Kernels reach memory through the functions of csrc/cuda/device.cuh; these, with the names that
// CUDA itself defines, are here. A thread that reads through a plain pointer is neither checked nor
// counted (AddressSanitizer still sees it).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__ inline  // as on a device, every file may have its own
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

constexpr int warpSize = 32;

namespace simt {

// A place in the source, by default that of the caller.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(
      const char* file = __builtin_FILE(), int line = __builtin_LINE()) noexcept {
    return {file, line};
  }
};

// An index that knows where it was written.
struct Index {
  int64_t value;
  Place place;
  template <typename I, typename = std::enable_if_t<std::is_integral<I>::value>>
  Index(I i, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : value(static_cast<int64_t>(i)), place{file, line} {}
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Access { kRead, kWrite, kAtomic };

// Memory whose accesses are checked: a buffer that the host passed, or shared memory of one block.
struct Region;

void touch(Region* region, const void* at, size_t bytes, size_t alignment, Access, Place);
// the same in global memory
void touch(const void* at, size_t bytes, size_t alignment, Access, Place);

struct Traffic {
  uint64_t read_bytes = 0;  // asked for by all threads
  uint64_t written_bytes = 0;
  uint64_t read_sectors = 0;  // different sectors of 32 bytes, summed over launches
  uint64_t written_sectors = 0;
  uint64_t accesses = 0;  // by loads, stores and atomics of one thread
};

struct Shape {
  dim3 grid;
  dim3 block;
  size_t shared = 0;  // bytes of dynamic shared memory
};

class Device {
 public:
  explicit Device(uint64_t seed = 0);
  ~Device();

  // Memory that kernels may reach; `element` is its item size. Replaces a buffer of that name.
  void buffer(const std::string& name, const void* begin, size_t bytes, size_t element);

  // Runs all blocks one after the other, or all at once where they wait for each other.
  void launch(const Shape& shape, const std::function<void()>& kernel, bool cooperative = false);

  // Of every grid from now on, only so many blocks at either end run; 0: all.
  void only_ends(size_t blocks);

  std::map<std::string, Traffic> traffic() const;
  void reset_traffic();

  struct State;

 private:
  std::unique_ptr<State> state_;
};

// Of the thread that runs.
struct Now {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Now now;

template <typename T>
class Reference;

// A pointer into shared memory.
template <typename T>
class SharedPointer {
 public:
  SharedPointer() = default;
  SharedPointer(Region* region, T* p) : region_(region), p_(p) {}

  Reference<T> operator[](Index i) const {
    return {region_, p_ + i.value, i.place};
  }
  SharedPointer operator+(int64_t i) const {
    return {region_, p_ + i};
  }
  SharedPointer operator-(int64_t i) const {
    return {region_, p_ - i};
  }
  SharedPointer& operator+=(int64_t i) {
    p_ += i;
    return *this;
  }
  T* at(size_t count, size_t alignment, Access access, Place place) const {
    touch(region_, p_, count * sizeof(T), alignment, access, place);
    return p_;
  }
  template <typename To>
  SharedPointer<To> cast() const {
    return {region_, reinterpret_cast<To*>(p_)};
  }

 private:
  Region* region_ = nullptr;
  T* p_ = nullptr;
};

template <typename T>
class Reference {
 public:
  Reference(Region* region, T* p, Place place) : region_(region), p_(p), place_(place) {}

  operator T() const {
    return *SharedPointer<T>(region_, p_).at(1, alignof(T), Access::kRead, place_);
  }
  Reference& operator=(T v) {
    *SharedPointer<T>(region_, p_).at(1, alignof(T), Access::kWrite, place_) = v;
    return *this;
  }
  Reference& operator=(const Reference& v) {
    return *this = static_cast<T>(v);
  }
  Reference(const Reference&) = default;
  Reference& operator+=(T v) {
    return *this = static_cast<T>(static_cast<T>(*this) + v);
  }
  Reference& operator*=(T v) {
    return *this = static_cast<T>(static_cast<T>(*this) * v);
  }
  Reference& operator|=(T v) {
    return *this = static_cast<T>(static_cast<T>(*this) | v);
  }
  SharedPointer<T> operator&() const {
    return {region_, p_};
  }

 private:
  Region* region_;
  T* p_;
  Place place_;
};

Region* static_shared(size_t bytes, size_t element, const char* name, Place);
Region* dynamic_shared();
unsigned char* begin_of(Region*);

template <typename T>
SharedPointer<T> make_static_shared(size_t count, const char* name, Place place = Place::here()) {
  Region* region = static_shared(count * sizeof(T), sizeof(T), name, place);
  return {region, reinterpret_cast<T*>(begin_of(region))};
}

inline SharedPointer<unsigned char> make_dynamic_shared() {
  Region* region = dynamic_shared();
  return {region, begin_of(region)};
}

enum class Wait { kNone, kBlock, kShuffle, kBallot, kWarp, kGrid, kPause, kDone };

// Waits until all threads of the block, warp mask or grid wait alike. Returns, of a block, the
// number of values that are not 0; of a shuffle, the value of lane `source`; of a ballot, the lanes
// whose values are not 0.
uint64_t wait(Wait, Place, uint64_t value = 0, uint32_t mask = 0, int source = 0);

int lane();

template <typename T>
T shuffle(uint32_t mask, T v, int source, Place place) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = wait(Wait::kShuffle, place, bits, mask, source);
  memcpy(&v, &bits, sizeof v);
  return v;
}

// `old` of *p, which becomes f(old).
template <typename T, typename F>
T atomic(T* p, const F& f) {
  const T old = *p;
  *p = f(old);
  return old;
}

template <typename T>
T* atomic_at(T* p, Place place) {
  touch(p, sizeof(T), sizeof(T), Access::kAtomic, place);
  return p;
}

template <typename T>
T* atomic_at(const SharedPointer<T>& p, Place place) {
  return p.at(1, sizeof(T), Access::kAtomic, place);
}

template <typename P>
struct Pointee;
template <typename T>
struct Pointee<T*> {
  using type = T;
};
template <typename T>
struct Pointee<SharedPointer<T>> {
  using type = T;
};
template <typename P>
using pointee = typename Pointee<P>::type;

}  // namespace simt

#define threadIdx (::simt::now.thread)
#define blockIdx (::simt::now.block)
#define blockDim (::simt::now.block_size)
#define gridDim (::simt::now.grid_size)

// ---- barriers, votes, shuffles

inline void __syncthreads(simt::Place place = simt::Place::here()) {
  simt::wait(simt::Wait::kBlock, place);
}
inline int __syncthreads_count(int predicate, simt::Place place = simt::Place::here()) {
  return static_cast<int>(simt::wait(simt::Wait::kBlock, place, predicate != 0));
}
inline int __syncthreads_or(int predicate, simt::Place place = simt::Place::here()) {
  return simt::wait(simt::Wait::kBlock, place, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, simt::Place place = simt::Place::here()) {
  return simt::wait(simt::Wait::kBlock, place, predicate == 0) == 0;
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, simt::Place place = simt::Place::here()) {
  simt::wait(simt::Wait::kWarp, place, 0, mask);
}
inline uint32_t __ballot_sync(
    uint32_t mask, int predicate, simt::Place place = simt::Place::here()) {
  return static_cast<uint32_t>(simt::wait(simt::Wait::kBallot, place, predicate != 0, mask));
}
inline int __any_sync(uint32_t mask, int predicate, simt::Place place = simt::Place::here()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, simt::Place place = simt::Place::here()) {
  return __ballot_sync(mask, predicate == 0, place) == 0;
}

template <typename T>
T __shfl_sync(
    uint32_t mask, T v, int source, int width = 32, simt::Place place = simt::Place::here()) {
  const int lane = simt::lane();
  return simt::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), place);
}
template <typename T>
T __shfl_xor_sync(
    uint32_t mask, T v, int with, int width = 32, simt::Place place = simt::Place::here()) {
  const int lane = simt::lane(), source = lane ^ with;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return simt::shuffle(mask, v, inside ? source : lane, place);
}
template <typename T>
T __shfl_up_sync(
    uint32_t mask, T v, unsigned by, int width = 32, simt::Place place = simt::Place::here()) {
  const int lane = simt::lane(), source = lane - static_cast<int>(by);
  return simt::shuffle(mask, v, source >= (lane & ~(width - 1)) ? source : lane, place);
}
template <typename T>
T __shfl_down_sync(
    uint32_t mask, T v, unsigned by, int width = 32, simt::Place place = simt::Place::here()) {
  const int lane = simt::lane(), source = lane + static_cast<int>(by);
  return simt::shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source : lane, place);
}

inline uint32_t __activemask() = delete;  // says nothing of which lanes will take part

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, simt::Place place = simt::Place::here()) {
  simt::wait(simt::Wait::kPause, place);
}

// ---- atomics, on global and shared memory

template <typename P, typename V>
simt::pointee<P> atomicAdd(P p, V v, simt::Place place = simt::Place::here()) {
  using T = simt::pointee<P>;
  return simt::atomic(simt::atomic_at(p, place), [&](T old) -> T { return old + v; });
}
template <typename P, typename V>
simt::pointee<P> atomicOr(P p, V v, simt::Place place = simt::Place::here()) {
  using T = simt::pointee<P>;
  return simt::atomic(simt::atomic_at(p, place), [&](T old) -> T { return old | v; });
}
template <typename P, typename V>
simt::pointee<P> atomicMax(P p, V v, simt::Place place = simt::Place::here()) {
  using T = simt::pointee<P>;
  return simt::atomic(
      simt::atomic_at(p, place), [&](T old) -> T { return old < T(v) ? T(v) : old; });
}
template <typename P, typename V>
simt::pointee<P> atomicMin(P p, V v, simt::Place place = simt::Place::here()) {
  using T = simt::pointee<P>;
  return simt::atomic(
      simt::atomic_at(p, place), [&](T old) -> T { return T(v) < old ? T(v) : old; });
}
template <typename P, typename V>
simt::pointee<P> atomicExch(P p, V v, simt::Place place = simt::Place::here()) {
  using T = simt::pointee<P>;
  return simt::atomic(simt::atomic_at(p, place), [&](T) -> T { return v; });
}
template <typename P, typename C, typename V>
simt::pointee<P> atomicCAS(P p, C compare, V v, simt::Place place = simt::Place::here()) {
  using T = simt::pointee<P>;
  return simt::atomic(
      simt::atomic_at(p, place), [&](T old) -> T { return old == T(compare) ? T(v) : old; });
}

// ---- arithmetic

inline int __popc(uint32_t v) {
  return __builtin_popcount(v);
}
inline int __popcll(uint64_t v) {
  return __builtin_popcountll(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}
inline int __clz(int v) {
  return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v));
}
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) {
    r |= (v >> i & 1u) << (31 - i);
  }
  return r;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fmaf_rn(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline uint32_t __float_as_uint(float v) {
  uint32_t r;
  memcpy(&r, &v, sizeof r);
  return r;
}
inline int __float_as_int(float v) {
  return static_cast<int>(__float_as_uint(v));
}
inline float __uint_as_float(uint32_t v) {
  float r;
  memcpy(&r, &v, sizeof r);
  return r;
}
inline float __int_as_float(int v) {
  return __uint_as_float(static_cast<uint32_t>(v));
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

// ---- 16-bit storage

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

float __half2float(__half);
__half __float2half(float);
inline __half __float2half_rn(float v) {
  return __float2half(v);
}
inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__nv_bfloat16 __float2bfloat16(float);
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  return __float2bfloat16(v);
}
