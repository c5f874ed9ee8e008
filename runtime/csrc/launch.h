// Checked `launch`es of a plan, and the kernels that they launch: plain data that Python has parsed.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "call.h"
#include "expression.h"

namespace enginery {

// What a kernel takes as an argument; i32 and f32 by value.
enum class ParameterKind : uint8_t { kPointer, kI32, kF32 };

enum class Access : uint8_t { kRead, kWrite, kReadWrite };

// Machine code of one kernel, and what launching it takes.
struct KernelSpec {
    std::string name;
    std::string symbol;  // of the function in the cubin
    std::string cubin;   // may be empty for the null device
    int32_t num_warps = 0;
    int64_t shared_bytes = 0;
    std::vector<ParameterKind> parameters;
    int32_t hidden = 0;  // null pointers that follow
    bool pdl = false;    // programmatic dependent launch: it waits for its predecessor itself
};

struct ArgumentSpec {
    std::string name;
    ParameterKind parameter = ParameterKind::kPointer;
    // Of a pointer.
    OperandKind kind = OperandKind::kBuffer;
    int32_t index = 0;   // buffer (of peers too), weight or state group; of an input its group, if it has one
    std::string target;  // what the pointer's memory is called
    int64_t offset = 0;
    Expression extent;  // bytes from offset on; of buffers, of each of the peers', and of weights
    Access access = Access::kRead;
    int32_t layer = -1;  // of a state
    // Of a number.
    Expression integer;
    float real = 0;
};

// A launch that does nothing but sum bf16 over ranks: a library may do it. Places of arguments, of one extent.
struct SumSpec {
    size_t part = 0;  // peers
    size_t sum = 0;   // a buffer
};

struct LaunchSpec {
    int32_t kernel = 0;
    int32_t region = 0;  // rises from launch to launch: each sees what those before it wrote
    std::array<Expression, 3> grid;
    std::vector<ArgumentSpec> arguments;
    std::vector<GuardRange> guard;
    std::optional<SumSpec> sums;
};

// What the plans of a CUDA target share beside state. Their largest step is in ExecutorSpec.
struct CudaSpec {
    int32_t arch = 0;          // compute capability: 90 is 9.0
    int64_t shared_bytes = 0;  // that a block of threads can have
    int32_t tile_tokens = 0;   // most tokens of an entry of the step input `tiles`
    int32_t max_blocks = 0;    // entries of a row of the step input `block_table`
    int32_t max_edits = 0;     // of a step
    std::vector<KernelSpec> kernels;
};

}  // namespace enginery
