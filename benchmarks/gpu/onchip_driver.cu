// Runs the on-chip inverse without torch, for compute-sanitizer: a few blocks, each twice, with the same bits wanted.
// nvcc compiles it for a GPU; g++ compiles the emulation of csrc/emulation, so that it can be tried without one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#ifdef __CUDACC__
#include "../../csrc/cuda/onchip.cu"
#else
#include "../../csrc/emulation/onchip.cpp"
#endif

using namespace starflow;
using namespace starflow::cuda;

#ifdef __CUDACC__
static void require(cudaError_t error) {
    if (error == cudaSuccess) return;
    printf("%s\n", cudaGetErrorString(error));
    exit(1);
}
static void* allocated(size_t bytes) {
    void* memory;
    require(cudaMalloc(&memory, bytes));
    return memory;
}
static void copied(void* to, const void* from, size_t bytes) {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
#else
static void* allocated(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }
static void copied(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
#endif

template <class T>
static T* on_device(const std::vector<T>& values) {
    T* memory = static_cast<T*>(allocated(values.size() * sizeof(T)));
    copied(memory, values.data(), values.size() * sizeof(T));
    return memory;
}

static std::vector<float> drawn(size_t n, float scale = 1) {
    std::vector<float> values(n);
    for (float& value : values) value = scale * float(rand() % 2001 - 1000) / 1000;
    return values;
}

struct Case {
    const char* name;
    bool everything, bf16, cached_on_chip, guided;
    int cluster, group, blocks;
};

static bool same(const Case& given) {
    constexpr int64_t B = 3, T = 4;
    Spec spec{};
    spec.token_dim = 5, spec.channels = 24, spec.layers = 2, spec.heads = 2, spec.head_dim = 12, spec.kv_heads = 2;
    spec.mlp_dim = 50, spec.bias = true, spec.affine = {Scale::exp, 0}, spec.bf16 = given.bf16;
    if (given.everything) {
        spec.affine = {Scale::softplus, 4}, spec.rotary = Rotary::half, spec.norm = Norm::rms_norm;
        spec.mlp = Mlp::swiglu, spec.bias = false, spec.kv_heads = 1;
        spec.start = spec.final_norm = spec.qk_norm = spec.post_norm = spec.flip = true;
    } else {
        spec.rotary = Rotary::none, spec.norm = Norm::layer_norm, spec.mlp = Mlp::gelu, spec.positions = int(T);
    }
    int copies = given.guided ? 2 : 1;
    OnchipCall call{};
    call.spec = spec, call.B = B, call.T = T, call.cond_slots = 1, call.blocks = given.blocks;
    call.plan = make_plan(spec, T, copies, given.group, given.cached_on_chip, given.cluster);
    size_t values = size_t(given.cluster) * call.plan.weight_bytes / (given.bf16 ? 2 : 4);
    std::vector<float> weights = drawn(values, 0.2f);
    // The upper half of a float32 is a bfloat16. Vectors among the matrices are float32, of two such halves.
    std::vector<uint16_t> halves(values);
    for (size_t i = 0; i < values; ++i) memcpy(&halves[i], reinterpret_cast<char*>(&weights[i]) + 2, 2);
    call.weights = given.bf16 ? static_cast<void*>(on_device(halves)) : static_cast<void*>(on_device(weights));
    call.cond = on_device(drawn(copies * B * spec.channels));
    if (spec.positions) call.positions = on_device(drawn(T * spec.channels));
    if (spec.rotary != Rotary::none) {
        call.cos = on_device(drawn(T * spec.head_dim / 2));
        call.sin = on_device(drawn(T * spec.head_dim / 2));
    }
    if (given.guided) call.guidance = on_device(drawn(B * T));
    call.rule = Rule::starflow, call.temperature = 0.7f;
    std::vector<float> cache(size_t(given.blocks) * given.group * copies * call.plan.cache_row, NAN);
    std::vector<float> noise = drawn(B * T * spec.token_dim), first(noise.size()), again(noise.size());
    for (auto* found : {&first, &again}) {
        call.state = on_device(noise), call.log_sigma = on_device(noise);
        call.cache = given.cached_on_chip ? nullptr : on_device(cache);
        launch_onchip(call, found == &again);
#ifdef __CUDACC__
        require(cudaDeviceSynchronize());
#endif
        copied(found->data(), call.state, noise.size() * sizeof(float));
    }
    bool finite = true;
    for (float value : first) finite = finite && std::isfinite(value);
    bool equal = !memcmp(first.data(), again.data(), first.size() * sizeof(float));
    printf("%s: %s\n", given.name,
           !finite ? "not finite"
           : equal ? "the same bits twice"
                   : "other bits the second time");
    return finite && equal;
}

int main() {
    const Case cases[] = {
        {"float32, one block", false, false, true, false, 1, 2, 2},
        {"float32, everything, guided, cache in memory", true, false, false, true, 1, 2, 2},
        {"bfloat16, everything, guided", true, true, true, true, 1, 3, 1},
        {"float32, cluster of 2, guided", false, false, true, true, 2, 1, 4},
        {"bfloat16, everything, cluster of 4, cache in memory", true, true, false, false, 4, 2, 4},
    };
    bool right = true;
    try {
        for (const Case& given : cases) right = same(given) && right;
    } catch (const std::exception& error) {
        printf("%s\n", error.what());
        right = false;
    }
    return right ? 0 : 1;
}
