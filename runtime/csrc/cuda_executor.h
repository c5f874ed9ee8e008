// Runs plans on CUDA devices, one for each rank: a step is one copy of its inputs, launches, and one copy of its
// logits. Steps in which every sequence decodes one token are graphs, captured when one of their size first comes.
#pragma once

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

    void launch(const Step& step) override;
    void collect() override;
    float* logits(int32_t row) override { return logits_ + row * logits_stride(); }
    void parallel_for(int32_t count, const std::function<void(int32_t)>& fn) override { pool_.run_each(count, fn); }
    std::map<std::string, int64_t> memory() const override;

  private:
    int64_t logits_stride() const { return spec_.ranks.front().logits_stride; }
    Variables padded(const Variables& variables) const;
    void run_step(const Step& step);

    ExecutorSpec spec_;
    StepInputs inputs_;
    ThreadPool pool_;
    ThreadPool launchers_;  // a thread for each rank: nobody waits for another's launches
    std::vector<std::unique_ptr<CudaRank>> ranks_;
    std::byte* inputs_host_ = nullptr;
    float* logits_ = nullptr;
    bool failed_ = false;  // a step did, and left nobody knows what
};

}  // namespace enginery
