// The CUDA features that the kernels use. Without nvcc the same code runs on fibers, see emulation/fibers.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define STARFLOW_DEVICE __device__ __forceinline__
#define STARFLOW_UNROLL _Pragma("unroll")
#define STARFLOW_NO_UNROLL _Pragma("unroll 1")
#else
#define STARFLOW_DEVICE inline
#define STARFLOW_UNROLL
#define STARFLOW_NO_UNROLL
#include "../emulation/fibers.h"
#endif

namespace starflow::cuda {

constexpr int WARP = 32;

#ifdef __CUDACC__
STARFLOW_DEVICE int thread_index() { return int(threadIdx.x); }
STARFLOW_DEVICE int block_index() { return int(blockIdx.x); }
STARFLOW_DEVICE int block_count() { return int(gridDim.x); }
STARFLOW_DEVICE void block_barrier() { __syncthreads(); }
STARFLOW_DEVICE void warp_barrier() { __syncwarp(); }
// A cluster is a group of thread blocks that can access each other's shared memory; it needs sm_90.
STARFLOW_DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
STARFLOW_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// Stores value in the shared memory of thread block `rank` of the cluster, at the place that corresponds to `at`.
STARFLOW_DEVICE void store_at(int rank, float* at, float value) {
    uint32_t here = uint32_t(__cvta_generic_to_shared(at)), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}
STARFLOW_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
STARFLOW_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
STARFLOW_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
#else
using emulation::block_barrier;
using emulation::block_count;
using emulation::block_index;
using emulation::cluster_barrier;
using emulation::cluster_rank;
using emulation::shuffle_xor;
using emulation::store_at;
using emulation::thread_index;
using emulation::warp_barrier;
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
#endif

// Returns the same bits in every lane: at each stage both lanes of a pair add the same two numbers.
STARFLOW_DEVICE float warp_sum(float value) {
    for (int mask = WARP / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

STARFLOW_DEVICE float warp_max(float value) {
    for (int mask = WARP / 2; mask; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

struct Bf16 {
    uint16_t bits;
};

STARFLOW_DEVICE float widen(float value) { return value; }
STARFLOW_DEVICE float widen(Bf16 value) { return float_of(uint32_t(value.bits) << 16); }

STARFLOW_DEVICE void narrow(float value, float& to) { to = value; }
// Rounds to the nearest, ties to even; NaN stays NaN.
STARFLOW_DEVICE void narrow(float value, Bf16& to) {
    uint32_t bits = bits_of(value);
    to.bits = uint16_t(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}

STARFLOW_DEVICE uint32_t bf16_pair(float low, float high) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    Bf16 one, two;
    narrow(low, one), narrow(high, two);
    return one.bits | uint32_t(two.bits) << 16;
#endif
}

// Computes sum += A B by the lanes of a warp, with A (16, 16) and B (16, 8) in the fragments of mma.m16n8k16.
// With g = lane / 4 and t = 2 (lane % 4), a lane gives A[g][t, t + 1], A[g + 8][..], A[g][t + 8, t + 9], A[g + 8][..],
// and rows t, t + 1 and t + 8, t + 9 of column g of B. It gets columns t, t + 1 of row g, then of row g + 8.
STARFLOW_DEVICE void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sum)[4]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    auto half = [](uint32_t pair, int k) { return widen(Bf16{uint16_t(k % 2 ? pair >> 16 : pair)}); };
    uint32_t given[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulation::with_warp(given, [&](auto of) {
        int lane = thread_index() % WARP;
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 16; ++k) {
                int row = lane / 4, column = lane % 4 * 2 + i % 2, part = k / 8, from = k % 8 / 2;
                uint32_t left = of(row * 4 + from, part * 2 + i / 2), right = of(column * 4 + from, 4 + part);
                sum[i] = fmaf(half(left, k), half(right, k), sum[i]);
            }
    });
#endif
}

// Four values that are loaded together.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
    T values[4];
};

// 16 bytes of values, the most that a thread loads at once.
template <class T>
struct alignas(16) Vector {
    static constexpr int SIZE = 16 / sizeof(T);
    T values[SIZE];
};

}  // namespace starflow::cuda
