// Runs plans on a CUDA device: the arena, the weights and the state lie there, and a step is one copy of its inputs,
// launches, and one copy of its logits. Steps in which every sequence decodes one token are graphs, captured when one
// of their size first comes.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "cuda_device.h"
#include "executor.h"
#include "step_inputs.h"
#include "thread_pool.h"

namespace enginery {

class CudaExecutor final : public Executor {
  public:
    // Throws EngineFormatError for a plan that is not sound, CapacityError where the device's memory does not suffice.
    CudaExecutor(const ExecutorSpec& spec, std::unique_ptr<CudaDevice> device);

    void launch(const Step& step) override;
    void collect() override;
    float* logits(int32_t row) override { return logits_ + row * rank().logits_stride; }
    void parallel_for(int32_t count, const std::function<void(int32_t)>& fn) override { pool_.run_each(count, fn); }
    std::map<std::string, int64_t> memory() const override;

  private:
    static constexpr size_t kNoInput = SIZE_MAX;

    struct BoundLaunch {
        const LaunchSpec* spec = nullptr;
        std::vector<std::pair<Variable, GuardRange>> guard;
        std::vector<size_t> inputs;  // of each argument, or kNoInput
        DeviceLaunch device;         // of the step, but for what never changes
    };

    const RankSpec& rank() const { return spec_.ranks.front(); }
    void check_spec() const;
    void allocate();
    void add_regions();
    void bind(const LaunchSpec& launch);
    void bind_pointer(BoundLaunch& bound, const ArgumentSpec& argument);
    int32_t state_region(int32_t group, int32_t layer);
    Variables padded(const Variables& variables) const;
    void run_step(const Step& step);
    void run_launches(const Variables& variables);
    void run_launch(BoundLaunch& bound, const Variables& variables);
    int32_t capture(const Variables& variables);

    ExecutorSpec spec_;
    std::unique_ptr<CudaDevice> device_;
    StepInputs inputs_;
    ThreadPool pool_;
    Variables largest_{};

    Address arena_ = 0;
    Address weights_ = 0;
    int64_t weights_begin_ = 0;  // in the file
    int64_t weights_bytes_ = 0;
    std::vector<Address> state_;
    Address inputs_address_ = 0;
    int64_t inputs_bytes_ = 0;
    std::byte* inputs_host_ = nullptr;
    float* logits_ = nullptr;

    std::vector<int32_t> buffer_regions_;
    std::vector<int32_t> weight_regions_;
    std::vector<int32_t> input_regions_;
    std::map<std::pair<int32_t, int32_t>, int32_t> state_regions_;  // by group and layer
    std::vector<BoundLaunch> launches_;
    std::map<int64_t, int32_t> graphs_;  // by tokens
    bool failed_ = false;                // a step did, and left nobody knows what
};

}  // namespace enginery
