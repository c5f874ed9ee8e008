// A rank's stream on a GPU that the driver shows. Ranks may share a GPU, and then its context.
#pragma once

#include <vector>

#include "cuda_device.h"
#include "cuda_driver.h"
#include "cuda_gpu.h"

namespace enginery {

class DriverDevice final : public CudaDevice {
  public:
    DriverDevice(const ExecutorSpec& spec, size_t rank);
    ~DriverDevice() override;

    void make_current() override { gpu_.make_current(); }
    cuda::Stream stream() const override { return stream_; }
    void connect(const std::vector<CudaDevice*>& ranks) override;
    Address allocate(int64_t bytes, const std::string& purpose) override;
    std::byte* allocate_pinned(int64_t bytes, const std::string& purpose) override;
    void free_pinned(std::byte* memory) override;
    bool wants_extents() const override { return false; }
    int32_t add_region(const Region&) override { return 0; }
    void move_region(int32_t, Address, int64_t) override {}
    void begin_step(const Variables&) override {}
    void copy_to_device(Address to, const std::byte* from, int64_t bytes) override;
    void copy_to_host(std::byte* to, Address from, int64_t bytes) override;
    void fill_zero(Address at, int64_t bytes) override;
    void synchronize() override;
    void mark(size_t number) override;
    void wait(size_t number) override;
    bool has_come(size_t number) override;
    int32_t load_kernel(const KernelSpec& kernel) override;
    void launch(const DeviceLaunch& launch) override;
    void begin_capture() override;
    int32_t end_capture() override;
    void abandon_capture() override;
    void replay(int32_t graph) override;

  private:
    struct LoadedKernel {
        const KernelSpec* spec = nullptr;
        cuda::Function function = nullptr;
    };

    void check_parameters(const KernelSpec& kernel, cuda::Function function) const;

    const cuda::Driver& driver_;
    const cuda::Gpu& gpu_;
    cuda::Stream stream_ = nullptr;
    std::array<cuda::Event, kMarks> events_{};
    std::vector<cuda::DevicePointer> allocations_;
    std::vector<std::byte*> pinned_;
    std::vector<cuda::Module> modules_;
    std::vector<LoadedKernel> kernels_;
    std::vector<cuda::GraphExec> graphs_;
    std::vector<void*> arguments_;  // of a launch; kept so that none allocates
};

}  // namespace enginery
