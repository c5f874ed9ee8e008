// Runs plans on the CPU: every rank has an arena, its weights mapped, its calls bound, and a team of the pool's
// threads.
#pragma once

#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "collectives.h"
#include "executor.h"
#include "mapping.h"
#include "plugins/kernel.h"
#include "thread_pool.h"

namespace enginery {

class CpuExecutor : public Executor {
  public:
    // Throws EngineFormatError for a plan that is not sound, TargetError for an ISA that the machine lacks, and
    // CapacityError where memory does not suffice.
    explicit CpuExecutor(const ExecutorSpec& spec);

    void launch(const Step& step) override;
    void collect() override {}
    float* logits(int32_t row) override;
    int32_t most_kept() const override { return keeps_ ? kMostKept : 0; }
    bool kept(int32_t row, int32_t wanted, std::vector<KeptLogit>& largest) const override;
    void parallel_for(int32_t count, const std::function<void(int32_t)>& fn) override { pool_.run_each(count, fn); }
    std::map<std::string, int64_t> memory() const override;
    std::string settle_weights(const std::function<bool()>& stop) override;

  private:
    struct BoundCall {
        std::unique_ptr<Kernel> kernel;
        std::vector<GuardRange> guard;
        int32_t region = 0;
        std::byte* shared_scratch = nullptr;
        int64_t shared_scratch_bytes = 0;
        std::unique_ptr<std::atomic<int64_t>> counter;
    };

    struct Rank {
        int32_t first_thread = 0;
        int32_t num_threads = 0;
        std::vector<int> cpus;  // that its threads run on
        Mapping weights;
        Mapping arena;           // buffers that all threads share
        Mapping thread_buffers;  // num_threads copies of the others, thread_buffer_bytes apart
        int64_t thread_buffer_bytes = 0;
        std::vector<int64_t> buffer_offsets;  // in the arena, or in a thread's copy
        Mapping scratch;                      // of each thread, then shared
        std::vector<Mapping> state;           // per group
        std::vector<BoundCall> calls;
        std::unique_ptr<Barrier> barrier;
    };

    void map_rank(Rank& rank, size_t index) const;
    void place_rank(Rank& rank) const;
    void bind_rank(Rank& rank, size_t index, KernelTable kernels) const;
    BoundOperand bind_operand(const Rank& rank, size_t index, const OperandSpec& operand) const;
    void divide_shared_scratch(Rank& rank) const;
    void check_logits() const;
    bool can_keep() const;
    void poison(const Step& step);  // poison.cpp
    void poison_new_blocks(const Step& step, const Rank& rank, size_t group) const;
    void run_thread(const Step& step, int32_t thread);
    void run_calls(const Step& step, const Rank& rank, int32_t thread) const;
    void fail(std::exception_ptr failure);

    ExecutorSpec spec_;
    bool keeps_ = false;  // whether the head can keep the largest logits of a row
    ThreadPool pool_;
    std::unique_ptr<Collectives> collectives_;
    std::vector<Rank> ranks_;
    std::mutex failure_mutex_;
    std::exception_ptr failure_;  // what ended a step; no further one is run
    std::byte poison_{0x7f};
};

}  // namespace enginery
