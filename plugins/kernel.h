// What a CPU operator implements, and what it is given. This header is the seam between the kernels, which are compiled
// once per ISA in a namespace of their own, and the executor, which is compiled once.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "runtime/csrc/call.h"
#include "runtime/csrc/executor.h"
#include "runtime/csrc/kept_logits.h"
#include "runtime/csrc/step.h"

namespace enginery {

class Collectives;

// Scratch is the same for every engine, so that `build-engine --plan` can tell memory without binding kernels: of each
// thread, and of a rank's threads together. engines/defaults.py says the same.
inline constexpr int64_t kThreadScratchBytes = int64_t{1} << 20;
inline constexpr int64_t kSharedScratchBytes = int64_t{1} << 20;

// The scratch of `linear` is divided: sums first, then what the head keeps of each row.
inline constexpr int64_t kKeptOffset = int64_t{1} << 16;
inline constexpr int64_t kMostKeptRows = (kThreadScratchBytes - kKeptOffset) / int64_t{sizeof(KeptRow)};

// One thread's part in running one call.
struct Team {
    int32_t thread = 0;  // 0 .. num_threads - 1, of the rank's threads
    int32_t num_threads = 1;
    std::byte* scratch = nullptr;         // kThreadScratchBytes, this thread's alone
    std::byte* shared_scratch = nullptr;  // this call's alone within its region
    int64_t shared_scratch_bytes = 0;
    std::atomic<int64_t>* counter = nullptr;  // of this call, zero when the step begins
};

// Where an operand lies. A per-thread buffer has one copy for each thread, thread_stride bytes apart.
struct BoundOperand {
    std::byte* data = nullptr;
    int64_t thread_stride = 0;

    template <class T>
    T* at(const Team& team) const {
        return reinterpret_cast<T*>(data + team.thread * thread_stride);
    }
    explicit operator bool() const { return data != nullptr; }
    bool per_thread() const { return thread_stride != 0; }
};

// What a call is bound to, once, before the first step.
struct Binding {
    std::map<std::string, BoundOperand> operands;  // of kState: the first block of the group's arena
    std::span<const StateGroupSpec> groups;
    std::span<const int32_t> num_blocks;  // per group
    int32_t rank = 0;
    int32_t world_size = 1;
    int32_t num_threads = 1;
    Collectives* collectives = nullptr;
    // Where the plan's logits go, [rows][·] of so many columns, if steps may want the largest of a row alone.
    const std::byte* logits = nullptr;
    int32_t vocab_size = 0;
};

// A bound call. Every thread of the rank's team calls run() with the same step; it neither allocates nor throws, but
// for a collective whose other ranks do not come.
class Kernel {
  public:
    virtual ~Kernel() = default;
    virtual void run(const Step& step, const Team& team) = 0;
    // Whether it wants a part of its region's shared scratch.
    virtual bool wants_shared_scratch() const { return false; }
    // Whether it makes the plan's logits and heeds Step::keep.
    virtual bool keeps_largest() const { return false; }
};

// Binds a call. Checks everything that run() will rely on and throws EngineFormatError naming every fault.
using KernelFactory = std::unique_ptr<Kernel> (*)(const CallSpec& call, const Binding& binding);

struct KernelEntry {
    const char* op;
    int32_t version;
    KernelFactory make;
};

using KernelTable = std::span<const KernelEntry>;

// One table per ISA (registry.cpp).
namespace avx2 {
KernelTable kernels();
}
namespace avx2_vnni {
KernelTable kernels();
}
namespace avx512 {
KernelTable kernels();
}
namespace avx512_vnni {
KernelTable kernels();
}
namespace avx512_vnni_bf16 {
KernelTable kernels();
}

}  // namespace enginery
