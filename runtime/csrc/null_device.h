// A CUDA device of the host's memory that computes nothing and checks everything that a real one would not forgive, or
// would forgive silently: kernels, arguments, bounds, alignment, grids, and the order in which memory is written and
// read. Logits come from the null executor, which reads the step as it lies on this device.
#pragma once

#include <map>
#include <vector>

#include "cuda_device.h"
#include "mapping.h"
#include "null_draws.h"

namespace enginery {

class NullDevice final : public CudaDevice {
  public:
    NullDevice(const ExecutorSpec& spec, size_t rank);

    void make_current() override {}
    cuda::Stream stream() const override { return nullptr; }
    void connect(const std::vector<CudaDevice*>& ranks) override;
    Address allocate(int64_t bytes, const std::string& purpose) override;
    std::byte* allocate_pinned(int64_t bytes, const std::string& purpose) override;
    void free_pinned(std::byte* memory) override;
    bool wants_extents() const override { return true; }
    int32_t add_region(const Region& region) override;
    void move_region(int32_t region, Address address, int64_t bytes) override;
    void begin_step(const Variables& variables) override;
    void copy_to_device(Address to, const std::byte* from, int64_t bytes) override;
    void copy_to_host(std::byte* to, Address from, int64_t bytes) override;
    void fill_zero(Address at, int64_t bytes) override;
    void synchronize() override;
    void mark(size_t) override { run_model(); }
    void wait(size_t) override {}
    bool has_come(size_t) override { return true; }
    int32_t load_kernel(const KernelSpec& kernel) override;
    void launch(const DeviceLaunch& launch) override;
    void begin_capture() override;
    int32_t end_capture() override;
    void abandon_capture() override;
    void replay(int32_t graph) override;

  private:
    struct RegionState {
        Region region;
        int64_t written_end = 0;  // bytes from its start that this step has written
    };

    struct Range {
        Address address = 0;
        int64_t bytes = 0;
        bool contains(Address at, int64_t count) const;
    };

    bool is_allocated(Address address, int64_t bytes) const;
    void check_launch(const DeviceLaunch& launch);
    void check_grid(const DeviceLaunch& launch) const;
    void check_pointer(const DeviceLaunch& launch, size_t index) const;
    void check_peers(const DeviceLaunch& launch, size_t index) const;
    void check_number(const DeviceLaunch& launch, size_t index) const;
    void check_is_written(const DeviceLaunch& launch, size_t index) const;
    void write(const LaunchArgument& argument);
    [[noreturn]] void refuse(const DeviceLaunch& launch, const std::string& what) const;
    [[noreturn]] void refuse(const DeviceLaunch& launch, size_t argument, const std::string& what) const;

    const RegionState& input(const char* name, int32_t group) const;
    NullStep::Find inputs() const;
    void run_model();
    void copy_content(std::byte* to, int32_t buffer, int64_t bytes);

    const RegionState* buffer(const std::string& name) const;

    ExecutorSpec spec_;
    std::unique_ptr<Executor> model_;  // of the first rank, whose logits are read
    std::vector<const NullDevice*> ranks_;
    std::map<Address, Mapping> allocations_;
    std::vector<Mapping> pinned_;
    std::vector<RegionState> regions_;
    std::vector<const KernelSpec*> kernels_;
    std::vector<std::vector<DeviceLaunch>> graphs_;
    bool capturing_ = false;
    // Of the step.
    Variables variables_{};
    bool is_computed_ = true;  // by the null executor
    bool is_drawn_ = true;
    int32_t num_rows_ = 0;  // without padding
    NullDraws draws_;
    std::vector<Range> copied_;
    int32_t last_plan_region_ = -1;
};

}  // namespace enginery
