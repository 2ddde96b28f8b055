// Digest of bytes, which shows whether they have changed.
#include "kernels.h"
#include "vec.h"

namespace starflow::STARFLOW_ISA {

namespace {

// Independent streams hide the latency of a multiplication.
constexpr int STREAMS = 8;
constexpr int64_t STRIPE = STREAMS * sizeof(Part);

typedef uint32_t Words __attribute__((vector_size(sizeof(Part))));

// For a fixed word this is a bijection of the hash, and for a fixed hash one of the word. So a change of one word always
// shows, and equal words after it never hide it.
INLINE Words mix(Words hash, Words word) {
    hash = (hash + word) * 0x9E3779B1u;
    return hash ^ (hash >> 15);
}

}  // namespace

uint64_t fingerprint(const Bytes* pieces, int64_t n) {
    Words hash[STREAMS]{};
    auto add = [&](const char* stripe) {
        UNROLL
        for (int i = 0; i < STREAMS; ++i) {
            Words word;
            std::memcpy(&word, stripe + i * sizeof(Words), sizeof(Words));
            hash[i] = mix(hash[i], word);
        }
    };
    for (int64_t piece = 0; piece < n; ++piece) {
        const char* bytes = pieces[piece].first;
        int64_t count = pieces[piece].count;
        for (; count >= STRIPE; bytes += STRIPE, count -= STRIPE) add(bytes);
        if (!count) continue;
        char last[STRIPE]{};
        std::memcpy(last, bytes, count);
        add(last);
    }
    uint64_t digest = 0, words[STRIPE / sizeof(uint64_t)];
    std::memcpy(words, hash, STRIPE);
    for (uint64_t word : words) {
        digest = (digest + word) * 0x9E3779B97F4A7C15u;
        digest ^= digest >> 32;
    }
    return digest;
}

}  // namespace starflow::STARFLOW_ISA
