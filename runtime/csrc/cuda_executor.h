// Runs plans on CUDA devices, one for each rank: a step is one copy of its inputs, launches, and one copy of its
// logits. Steps in which every sequence decodes one token are graphs: captured at load, by size; those that list
// what is likeliest, rank what was drawn or keep changed logits, when one of their kind and size first comes.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "cuda_device.h"
#include "cuda_rank.h"
#include "executor.h"
#include "step_inputs.h"
#include "thread_pool.h"

namespace enginery {

class CudaExecutor final : public Executor {
  public:
    // devices: of each rank. Throws as CudaRank does.
    CudaExecutor(const ExecutorSpec& spec, std::vector<std::unique_ptr<CudaDevice>> devices);
    // A rank's memory goes when no other reads it any more.
    ~CudaExecutor() override;

    void launch(const Step& step) override;
    void collect() override;
    float* logits(int32_t row) override { return logits_ + row * logits_stride(); }
    DrawLimits draw_limits() const override;
    DrawnRow drawn(int32_t row) const override;
    void parallel_for(int32_t count, const std::function<void(int32_t)>& fn) override { pool_.run_each(count, fn); }
    std::map<std::string, int64_t> memory() const override;
    std::string sums_by() const override { return sums_by_; }

  private:
    // Memory of the host that the device copies from and to in one of two steps.
    struct Exchange {
        std::byte* inputs = nullptr;
        int32_t* token = nullptr;
        float* logprob = nullptr;
        int32_t* rank = nullptr;
        int32_t* top_tokens = nullptr;
        float* top_logprobs = nullptr;
    };

    int64_t logits_stride() const { return spec_.ranks.front().logits_stride; }
    bool draws() const { return !spec_.ranks.front().sample.empty(); }
    void join_library();
    bool share_gpus() const;
    void leave_library();
    void allocate_pinned(int64_t inputs_bytes);
    void prepare_graphs();
    int64_t largest_graph() const;
    Variables padded(Variables variables) const;
    void run_step(const Step& step);
    void wait_for(size_t rank);
    void wait_for_all();
    void fail();
    void copy_results(const Step& step, const Variables& variables, Exchange& exchange);

    ExecutorSpec spec_;
    StepInputs inputs_;
    ThreadPool pool_;
    ThreadPool launchers_;  // a thread for each rank: nobody waits for another's launches
    std::vector<std::unique_ptr<CudaRank>> ranks_;
    std::array<Exchange, CudaDevice::kMarks> exchanges_;  // by the step's mark
    float* logits_ = nullptr;
    std::deque<size_t> launched_;  // marks of steps that were not collected yet
    size_t next_mark_ = 0;
    size_t collected_ = 0;
    bool failed_ = false;  // a step did, and left nobody knows what
    std::string sums_by_;
    bool has_joined_ = false;  // a library sums
};

}  // namespace enginery
