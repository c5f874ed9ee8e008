// One rank of an engine on a CUDA device: its memory, its launches bound to that memory, and graphs of them.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "cuda_device.h"
#include "executor.h"
#include "nccl.h"
#include "peer_tables.h"
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

    // Of all ranks in order, this among them: tells its launches where the others' buffers lie. Before any step.
    void connect(const std::vector<std::unique_ptr<CudaRank>>& ranks);

    // Whether a library could do some of its launches.
    bool sums() const;

    // From now on NCCL does those, but in graphs. Every rank joins and leaves at the same time, on a thread of its own.
    // Throws EngineryError.
    void join(const nccl::Library& library, const nccl::UniqueId& id);
    void leave();

    // "Rank 1 of 2, on GPU 1".
    std::string name() const;

    // What a step runs. recurs: as a graph.
    struct Work {
        Variables variables;
        bool draws = false;
        bool recurs = false;
    };

    // Captures the graph of a step that recurs, of which nothing runs.
    void prepare(const StepInputs& inputs, const Work& work);

    bool is_prepared(const Work& work) const { return graphs_.contains({work.variables, work.draws}); }

    // Enqueues a step, whose inputs lie at `from` as placed.
    void launch(const StepInputs& inputs, const Work& work, const std::byte* from, int64_t bytes);

    // Enqueues a copy of a buffer's beginning to the host.
    void copy_buffer(int32_t buffer, std::byte* to, int64_t bytes);

    // Marks the end of what was enqueued so far, and waits for it (CudaDevice).
    void mark(size_t number);
    void wait(size_t number);
    bool has_come(size_t number);

    // Bytes by purpose, without a library's.
    std::map<std::string, int64_t> memory() const;

  private:
    static constexpr size_t kNoInput = SIZE_MAX;

    struct BoundLaunch {
        const LaunchSpec* spec = nullptr;
        std::vector<std::pair<Variable, GuardRange>> guard;
        std::vector<size_t> inputs;  // of each argument, or kNoInput
        Address part = 0;            // of a sum
        DeviceLaunch device;         // of the step, but for what never changes
    };

    void check_spec() const;
    // Whether the buffer has room for all rows.
    bool holds(int32_t buffer, int64_t row_bytes) const;
    void allocate(ThreadPool& pool);
    void add_regions(const StepInputs& inputs);
    std::vector<BoundLaunch> bind_all(const std::vector<LaunchSpec>& launches, const StepInputs& inputs,
                                      const std::vector<int32_t>& kernels);
    BoundLaunch bind(const LaunchSpec& launch, const StepInputs& inputs);
    void bind_pointer(BoundLaunch& bound, const ArgumentSpec& argument, const StepInputs& inputs);
    int32_t state_region(int32_t group, int32_t layer);
    Address address_of(const BufferSpec& like) const;
    void place_inputs(const StepInputs& inputs);
    void run(const StepInputs& inputs, const Work& work);
    void run_launches(std::vector<BoundLaunch>& launches, const StepInputs& inputs, const Work& work);
    void run_launch(BoundLaunch& bound, const StepInputs& inputs, const Variables& variables);
    void sum(const BoundLaunch& bound, const Variables& variables);
    int32_t capture(const StepInputs& inputs, const Work& work);

    const ExecutorSpec& spec_;
    const RankSpec& rank_;
    const size_t number_;
    std::unique_ptr<CudaDevice> device_;
    std::unique_ptr<nccl::Communicator> communicator_;  // goes before the device

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
    PeerTables peers_;
    std::vector<BoundLaunch> forward_;
    std::vector<BoundLaunch> sample_;
    std::map<std::pair<Variables, bool>, int32_t> graphs_;  // by variables, and whether it draws
};

}  // namespace enginery
