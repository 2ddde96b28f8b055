// Measures five constants of the chip and prints one line "name value unit" for each.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define CHECK(call) check(call, #call)

static void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

// Returns the median microseconds of run(), of nine after the first.
static double microseconds(const std::function<void(cudaStream_t)>& run) {
    cudaStream_t stream;
    cudaEvent_t start, end;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 10; ++i) {
        float milliseconds;
        CHECK(cudaEventRecord(start, stream));
        run(stream);
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaGetLastError());
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&milliseconds, start, end));
        if (i) times.push_back(milliseconds);
    }
    std::sort(times.begin(), times.end());
    return 1e3 * times[times.size() / 2];
}

__global__ void empty() {}

static double graph_node() {
    constexpr int NODES = 1000;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < NODES; ++i) empty<<<1, 32, 0, stream>>>();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    return microseconds([&](cudaStream_t on) { CHECK(cudaGraphLaunch(ready, on)); }) / NODES;
}

// Lines of 128 bytes, each with the index of the next: a cycle through all of them in an order without a pattern.
constexpr int LINE = 32;

__global__ void link(unsigned* lines, unsigned count) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        lines[size_t(i) * LINE] = (i * 1664525u + 1013904223u) % count;
}

__global__ void follow(const unsigned* lines, unsigned hops, unsigned* last) {
    unsigned at = 0;
    for (unsigned i = 0; i < hops; ++i) at = __ldcg(lines + size_t(at) * LINE);
    *last = at;
}

// Returns the latency of a load, in a buffer of so many lines, a power of two.
static double latency(unsigned count) {
    unsigned *lines, *last;
    CHECK(cudaMalloc(&lines, size_t(count) * LINE * sizeof(unsigned)));
    CHECK(cudaMalloc(&last, sizeof(unsigned)));
    link<<<256, 256>>>(lines, count);
    CHECK(cudaDeviceSynchronize());
    unsigned hops = std::min(count, 1u << 16);
    double found = microseconds([&](cudaStream_t on) { follow<<<1, 1, 0, on>>>(lines, hops, last); }) / hops;
    CHECK(cudaFree(lines));
    CHECK(cudaFree(last));
    return found;
}

__global__ void barriers(unsigned* arrived, int count) {
    for (int i = 1; i <= count; ++i) {
        __syncthreads();
        if (!threadIdx.x) {
            unsigned seen;
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
            while (seen < unsigned(i) * gridDim.x);
        }
        __syncthreads();
    }
}

static double grid_barrier(int processors) {
    int count = 1000;
    unsigned* arrived;
    CHECK(cudaMalloc(&arrived, sizeof(unsigned)));
    return microseconds([&](cudaStream_t on) {
               void* arguments[] = {&arrived, &count};
               CHECK(cudaMemsetAsync(arrived, 0, sizeof(unsigned), on));
               CHECK(cudaLaunchCooperativeKernel((const void*)barriers, processors, 256, arguments, 0, on));
           }) /
           count;
}

static double copy() {
    size_t bytes = size_t(1) << 30;
    char *from, *to;
    CHECK(cudaMalloc(&from, bytes));
    CHECK(cudaMalloc(&to, bytes));
    CHECK(cudaMemset(from, 1, bytes));
    auto run = [&](cudaStream_t on) { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, on)); };
    return 2e-3 * double(bytes) / microseconds(run);
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    printf("graph node, %.3f, us\n", graph_node());
    printf("load from the L2 cache, %.3f, us\n", latency(1u << 16));
    printf("load from device memory, %.3f, us\n", latency(1u << 22));
    printf("grid barrier of %d blocks, %.3f, us\n", device.multiProcessorCount,
           grid_barrier(device.multiProcessorCount));
    printf("copy, %.0f, GB/s\n", copy());
}
