// Communication between the thread blocks of a cluster; a thread block without a cluster is a cluster of one.
#pragma once

#include "device.h"

namespace starflow::cuda {

template <bool CLUSTERED>
struct Cluster {
    int blocks;

    STARFLOW_DEVICE int size() const { return CLUSTERED ? blocks : 1; }
    STARFLOW_DEVICE static int rank() {
        if constexpr (CLUSTERED) return cluster_rank();
        return 0;
    }

    // Must be called before reading what others have stored, and before storing over what they read.
    STARFLOW_DEVICE static void barrier() {
        if constexpr (CLUSTERED)
            cluster_barrier();
        else
            block_barrier();
    }

    // Stores value at `to` in the shared memory of every thread block.
    STARFLOW_DEVICE void store(float* to, float value) const {
        if constexpr (CLUSTERED) {
            STARFLOW_NO_UNROLL
            for (int other = 0; other < blocks; ++other) store_at(other, to, value);
        } else {
            *to = value;
        }
    }
};

}  // namespace starflow::cuda
