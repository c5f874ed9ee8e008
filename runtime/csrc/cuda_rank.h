// One rank of an engine on a CUDA device: its memory, its launches bound to that memory, and graphs of them.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "cuda_device.h"
#include "executor.h"
#include "step_inputs.h"
#include "thread_pool.h"

namespace enginery {

class CudaRank {
  public:
    // Loads kernels and weights. Throws EngineFormatError for a plan that is not sound, CapacityError where the
    // device's memory does not suffice. inputs_bytes: those of the largest step.
    CudaRank(const ExecutorSpec& spec, size_t rank, const StepInputs& inputs, int64_t inputs_bytes,
             std::unique_ptr<CudaDevice> device, ThreadPool& pool);

    CudaDevice& device() { return *device_; }

    // Enqueues a step of these variables, whose inputs lie at `from` as placed: by a graph if it is one that recurs.
    void launch(const StepInputs& inputs, const Variables& variables, const std::byte* from, int64_t bytes,
                bool recurs);

    // Enqueues a copy of the first rows of logits.
    void copy_logits(float* to, int32_t num_rows);

    // Waits for all that was enqueued.
    void wait();

    // Bytes by purpose.
    std::map<std::string, int64_t> memory() const;

  private:
    static constexpr size_t kNoInput = SIZE_MAX;

    struct BoundLaunch {
        const LaunchSpec* spec = nullptr;
        std::vector<std::pair<Variable, GuardRange>> guard;
        std::vector<size_t> inputs;  // of each argument, or kNoInput
        DeviceLaunch device;         // of the step, but for what never changes
    };

    void check_spec() const;
    void allocate(ThreadPool& pool);
    void add_regions(const StepInputs& inputs);
    void bind(const LaunchSpec& launch, const StepInputs& inputs);
    void bind_pointer(BoundLaunch& bound, const ArgumentSpec& argument, const StepInputs& inputs);
    int32_t state_region(int32_t group, int32_t layer);
    void run_launches(const StepInputs& inputs, const Variables& variables);
    void run_launch(BoundLaunch& bound, const StepInputs& inputs, const Variables& variables);
    int32_t capture(const StepInputs& inputs, const Variables& variables);

    const ExecutorSpec& spec_;
    const RankSpec& rank_;
    std::unique_ptr<CudaDevice> device_;

    Address arena_ = 0;
    Address weights_ = 0;
    int64_t weights_begin_ = 0;  // in the file
    int64_t weights_bytes_ = 0;
    std::vector<Address> state_;
    Address inputs_ = 0;
    int64_t inputs_bytes_ = 0;

    std::vector<int32_t> buffer_regions_;
    std::vector<int32_t> weight_regions_;
    std::vector<int32_t> input_regions_;
    std::map<std::pair<int32_t, int32_t>, int32_t> state_regions_;  // by group and layer
    std::vector<BoundLaunch> launches_;
    std::map<Variables, int32_t> graphs_;
};

}  // namespace enginery
