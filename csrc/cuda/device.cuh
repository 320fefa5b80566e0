// How kernels reach memory. With a CUDA compiler these are plain loads and stores; the tests give
// another `simt.h`, which runs the same kernels on the CPU and checks and counts every access.
// Global memory is read and written through load, store and their vector forms only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MODMASK_DEVICE __device__ __forceinline__
#else
#include "simt.h"
#define MODMASK_DEVICE inline
#endif

namespace modmask::cuda {

// What a kernel is started with.
struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared = 0;  // bytes of dynamic shared memory
};

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T v[kCount];
};

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

#if defined(__CUDACC__)

// Shared memory of a block; MODMASK_DYNAMIC_SHARED is what the launch asked for, in bytes.
#define MODMASK_SHARED(type, name, count) __shared__ type name[count]
#define MODMASK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

template <typename T>
using SharedPointer = T*;

template <typename T>
__device__ __forceinline__ T* shared_cast(unsigned char* p) {
  return reinterpret_cast<T*>(p);
}

template <typename T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}

template <typename T>
__device__ __forceinline__ void store(T* p, T v) {
  *p = v;
}

// kCount consecutive elements at an address that is a multiple of their size together.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, kCount>*>(p);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, kCount>& v) {
  *reinterpret_cast<Vector<T, kCount>*>(p) = v;
}

// What other blocks wrote before a grid_barrier, past the first-level cache.
template <typename T>
__device__ __forceinline__ T load_coherent(const T* p) {
  return __ldcg(p);
}

template <int kCount>
__device__ __forceinline__ Vector<float, kCount> load_coherent_vector(const float* p) {
  static_assert(kCount == 4, "16 bytes");
  const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// Waits until all threads of the grid are here; all blocks must run at once. `arrivals` is one word
// for the whole launch, 0 at its start.
__device__ __forceinline__ void grid_barrier(uint32_t* arrivals) {
  __syncthreads();
  if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
    const uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
    __threadfence();
    const uint32_t all = (atomicAdd(arrivals, 1u) / blocks + 1) * blocks;
    while (static_cast<int32_t>(*reinterpret_cast<volatile uint32_t*>(arrivals) - all) < 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

#else

#define MODMASK_SHARED(type, name, count) \
  const auto name = ::simt::make_static_shared<type>(count, #name)
#define MODMASK_DYNAMIC_SHARED(name) const auto name = ::simt::make_dynamic_shared()

template <typename T>
using SharedPointer = simt::SharedPointer<T>;

template <typename T>
SharedPointer<T> shared_cast(SharedPointer<unsigned char> p) {
  return p.cast<T>();
}

template <int kCount, typename T>
Vector<T, kCount> load_vector(const T* p, simt::Place place = simt::Place::here()) {
  Vector<T, kCount> v;
  simt::touch(p, sizeof v, sizeof v, simt::Access::kRead, place);
  memcpy(&v, p, sizeof v);
  return v;
}

template <int kCount, typename T>
Vector<T, kCount> load_vector(SharedPointer<T> p, simt::Place place = simt::Place::here()) {
  Vector<T, kCount> v;
  memcpy(&v, p.at(kCount, sizeof v, simt::Access::kRead, place), sizeof v);
  return v;
}

template <int kCount, typename T>
void store_vector(T* p, const Vector<T, kCount>& v, simt::Place place = simt::Place::here()) {
  simt::touch(p, sizeof v, sizeof v, simt::Access::kWrite, place);
  memcpy(p, &v, sizeof v);
}

template <int kCount, typename T>
void store_vector(
    SharedPointer<T> p, const Vector<T, kCount>& v, simt::Place place = simt::Place::here()) {
  memcpy(p.at(kCount, sizeof v, simt::Access::kWrite, place), &v, sizeof v);
}

template <typename T>
T load(const T* p, simt::Place place = simt::Place::here()) {
  return load_vector<1>(p, place).v[0];
}

template <typename T>
T load_coherent(const T* p, simt::Place place = simt::Place::here()) {
  return load(p, place);
}

template <int kCount>
Vector<float, kCount> load_coherent_vector(
    const float* p, simt::Place place = simt::Place::here()) {
  return load_vector<kCount>(p, place);
}

inline void grid_barrier(uint32_t* arrivals, simt::Place place = simt::Place::here()) {
  (void)arrivals;
  simt::wait(simt::Wait::kGrid, place);
}

template <typename T>
void store(T* p, T v, simt::Place place = simt::Place::here()) {
  store_vector<1>(p, Vector<T, 1>{{v}}, place);
}

#endif

MODMASK_DEVICE float to_float(float v) {
  return v;
}
MODMASK_DEVICE float to_float(__half v) {
  return __half2float(v);
}
MODMASK_DEVICE float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <typename T>
MODMASK_DEVICE T from_float(float v);
template <>
MODMASK_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
MODMASK_DEVICE __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
MODMASK_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace modmask::cuda
