// A GPU, by its number among those that the driver shows (CUDA_VISIBLE_DEVICES decides), and its primary context.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_driver.h"

namespace enginery::cuda {

// What the driver says of it.
struct GpuInfo {
    std::string name;
    int32_t arch = 0;          // compute capability: 90 is 9.0
    int32_t driver = 0;        // the newest CUDA that the driver knows: 12040 is 12.4
    int64_t shared_bytes = 0;  // that a block of threads can have
    int64_t free_bytes = 0;
    int64_t total_bytes = 0;
};

class Gpu {
  public:
    // How many there are. Throws TargetError where that is none.
    static int32_t count();

    // The GPU with a context that stays until the process ends. Throws TargetError where it is not there or cannot be
    // used; the next call tries again.
    static const Gpu& get(int32_t number);

    // For the calling thread. Throws TargetError.
    void make_current() const;
    GpuInfo info() const;
    int32_t number() const { return device_; }

    // Kernels of this GPU may touch the other's memory from now on. Throws TargetError where they cannot.
    void reach(const Gpu& other) const;

  private:
    explicit Gpu(int32_t number);

    const Driver& driver_;
    Device device_ = 0;
    Context context_ = nullptr;
};

}  // namespace enginery::cuda
