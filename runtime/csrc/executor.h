// What the serving loop asks of a device. One implementation per file: cpu_executor.cpp, cuda_executor.cpp,
// null_executor.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "call.h"
#include "kept_logits.h"
#include "launch.h"
#include "step.h"
#include "weight_pages.h"

namespace enginery {

// A group of layers that keep the same kind of state (DESIGN section 5).
struct StateGroupSpec {
    std::string name;
    std::string kind;    // "full" or "window"
    int32_t window = 0;  // a token sees itself and window - 1 before it; 0 for "full"
    int32_t num_layers = 0;
    int32_t block_size = 0;    // tokens
    int64_t block_bytes = 0;   // one contiguous range over all layers of the group, per rank
    int32_t num_kv_heads = 0;  // of this rank
    int32_t head_dim = 0;
    std::string dtype;  // "f32", "bf16", "fp8" or "i8"
};

struct WeightSpec {
    std::string name;
    std::string layout;
    int64_t offset = 0;  // bytes from the start of the file
    int64_t bytes = 0;
};

struct BufferSpec {
    std::string name;
    int64_t bytes = 0;        // with every variable at its largest
    int64_t offset = 0;       // within the arena; buffers that never live together share bytes
    bool per_thread = false;  // every thread has its own
    bool zeroed = false;      // zero after loading, and every launch leaves it so
    bool kept = false;        // lives from step to step
};

// Where a plan leaves what it draws: buffers of the rank, and how much there is.
struct DrawsSpec {
    int32_t token = -1;  // i32 [rows], as are the next two
    int32_t logprob = -1;
    int32_t rank = -1;
    int32_t top_tokens = -1;  // [rows, top]
    int32_t top_logprobs = -1;
    int32_t top = 0;
    int32_t edit_slots = 0;
};

// What one rank executes.
struct RankSpec {
    std::string weights_path;
    int64_t weights_file_bytes = 0;
    std::vector<WeightSpec> weights;
    std::vector<BufferSpec> buffers;
    int64_t arena_bytes = 0;
    std::vector<CallSpec> forward;  // of a CPU target
    int32_t gpu = 0;                // of a CUDA target: the GPU it runs on, as the driver counts them
    std::vector<LaunchSpec> launches;
    std::vector<LaunchSpec> sample;  // that draw tokens from the logits, if the plan can
    DrawsSpec draws;
    int32_t logits_buffer = -1;  // rank 0: [rows, logits_stride] f32
    int64_t logits_stride = 0;   // elements
};

struct ExecutorSpec {
    std::string isa;  // "avx2", "avx2-vnni", "avx512", "avx512-vnni"
    std::vector<RankSpec> ranks;
    std::vector<StateGroupSpec> groups;
    std::vector<int32_t> num_blocks;  // per group
    int32_t vocab_size = 0;
    int32_t num_threads = 0;
    int32_t max_tokens = 0;  // of one step
    int32_t max_rows = 0;
    int32_t max_sequences = 0;
    WeightPages weight_pages = WeightPages::kAuto;  // of a CPU target
    CudaSpec cuda;                                  // of a CUDA target
};

class CudaDevice;

// What an executor that draws tokens can do at most. Steps that ask for more are drawn from by the caller.
struct DrawLimits {
    bool draws = false;
    int32_t edit_slots = 0;
    int32_t max_edits = 0;  // of a step
    int32_t max_logprobs = 0;
    int32_t vocab_size = 0;
};

// Of a row: the token (-1: a logit is not finite, -2: none is allowed), and what was asked for of logprobs and rank.
struct DrawnRow {
    int32_t token = -1;
    float logprob = 0;
    int32_t rank = 0;
    const int32_t* top_tokens = nullptr;
    const float* top_logprobs = nullptr;
};

class Executor {
  public:
    virtual ~Executor() = default;

    // Starts a step. Its arrays stay valid until collect() returns. A step with draws may follow one that has some
    // before that is collected, but no third.
    virtual void launch(const Step& step) = 0;

    // Waits for the earliest step that was not collected yet.
    virtual void collect() = 0;

    // [vocab_size] f32 of row `row` of the step collected last, if it had no draws. The caller may change them
    // (penalties), until the next launch.
    virtual float* logits(int32_t row) = 0;

    // How many of a row's largest logits a step can ask for instead of all (Step::keep); 0 where it cannot.
    virtual int32_t most_kept() const { return 0; }

    // Those of row `row` of the step collected last, which wanted so many, largest first, of equals the lower token.
    // False where a logit of the row is not finite.
    virtual bool kept(int32_t /*row*/, int32_t /*wanted*/, std::vector<KeptLogit>& /*largest*/) const { return false; }

    virtual DrawLimits draw_limits() const { return {}; }

    // Of row `row` of the step collected last, which had draws. Valid until the second launch from now on.
    virtual DrawnRow drawn(int32_t /*row*/) const { return {}; }

    // Runs fn(0) .. fn(count - 1), each once, on the device's host threads; returns when all are done.
    virtual void parallel_for(int32_t count, const std::function<void(int32_t)>& fn) = 0;

    // Bytes by purpose, for /metrics: "weights", "activations", "state", ...
    virtual std::map<std::string, int64_t> memory() const = 0;

    // Puts weights where they are read the fastest, beside steps, and says what it did; "" where nothing was to be
    // done.
    virtual std::string settle_weights(const std::function<bool()>& /*stop*/) { return {}; }

    // What sums large messages over ranks; empty where nothing does.
    virtual std::string sums_by() const { return {}; }
};

std::unique_ptr<Executor> make_cpu_executor(const ExecutorSpec& spec);

// On GPUs or null devices (cuda_device.h), one for each rank.
std::unique_ptr<Executor> make_cuda_executor(const ExecutorSpec& spec,
                                             std::vector<std::unique_ptr<CudaDevice>> devices);

// Keeps in each slot a hash of the tokens it can see through the block tables, and derives logits from it:
// a wrong table, slot or position changes the tokens that come out.
std::unique_ptr<Executor> make_null_executor(const ExecutorSpec& spec);

}  // namespace enginery
