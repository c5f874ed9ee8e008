// What the CUDA executor asks of a device: memory, copies, kernels and graphs, all in the order of one stream.
//
// driver_device.cpp does it with the driver, null_device.cpp on the host, where it checks every launch and computes
// nothing. What only the null device needs to know (regions, steps, extents) others may ignore.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "executor.h"
#include "launch.h"

namespace enginery {

using Address = uint64_t;

constexpr int64_t kPointerAlignment = 16;  // which kernels are promised of every pointer

// A named part of the device's memory.
struct Region {
    OperandKind kind = OperandKind::kBuffer;
    std::string name;
    int32_t group = -1;  // of a state or of an input that each state group has
    Address address = 0;
    int64_t bytes = 0;
    bool keeps =
        false;  // its content lives from step to step: weights, state, counters that every launch leaves at zero
};

struct LaunchArgument {
    uint64_t bits = 0;  // the address, or the number
    int32_t region = -1;
    int64_t extent = 0;  // bytes that the kernel may touch from the address on
};

struct DeviceLaunch {
    const LaunchSpec* spec = nullptr;
    int32_t kernel = 0;  // as load_kernel() called it
    std::array<int64_t, 3> grid{};
    std::vector<LaunchArgument> arguments;
};

// Memory is freed with the device. Functions that fail throw EngineryError or one of its kinds, naming what was asked.
class CudaDevice {
  public:
    CudaDevice() = default;
    virtual ~CudaDevice() = default;
    CudaDevice(const CudaDevice&) = delete;
    CudaDevice& operator=(const CudaDevice&) = delete;

    // Every thread calls this before the others.
    virtual void make_current() = 0;

    // The driver's, for libraries that work in its order; nullptr where there is no driver.
    virtual cuda::Stream stream() const = 0;

    // The devices of all ranks in order, this among them: launches of this one may touch memory of all from now on.
    // Throws TargetError where the hardware cannot do that.
    virtual void connect(const std::vector<CudaDevice*>& ranks) = 0;

    // On 256 bytes. purpose: for the message of a CapacityError.
    virtual Address allocate(int64_t bytes, const std::string& purpose) = 0;
    // Memory of the host that copies read and write while the host goes on.
    virtual std::byte* allocate_pinned(int64_t bytes, const std::string& purpose) = 0;
    virtual void free_pinned(std::byte* memory) = 0;

    // Whether launches must say how far arguments reach.
    virtual bool wants_extents() const = 0;
    virtual int32_t add_region(const Region& region) = 0;
    // An input lies elsewhere in the next step.
    virtual void move_region(int32_t region, Address address, int64_t bytes) = 0;
    virtual void begin_step(const Variables& variables) = 0;

    virtual void copy_to_device(Address to, const std::byte* from, int64_t bytes) = 0;
    virtual void copy_to_host(std::byte* to, Address from, int64_t bytes) = 0;
    virtual void fill_zero(Address at, int64_t bytes) = 0;
    virtual void synchronize() = 0;
    // Marks this place of the stream, under one of kMarks numbers; wait() returns when the device has come there.
    static constexpr size_t kMarks = 2;
    virtual void mark(size_t number) = 0;
    virtual void wait(size_t number) = 0;
    // Whether wait() would return at once.
    virtual bool has_come(size_t number) = 0;

    // Throws EngineFormatError where the machine code is not what the plan says.
    virtual int32_t load_kernel(const KernelSpec& kernel) = 0;
    virtual void launch(const DeviceLaunch& launch) = 0;

    // Launches between begin_capture() and end_capture() are kept, not run; replay() runs them all.
    virtual void begin_capture() = 0;
    virtual int32_t end_capture() = 0;
    virtual void abandon_capture() = 0;
    virtual void replay(int32_t graph) = 0;
};

// The GPU that the rank's spec names. Throws TargetError where it is not there, or does not run code for
// spec.cuda.arch.
std::unique_ptr<CudaDevice> make_driver_device(const ExecutorSpec& spec, size_t rank);
std::unique_ptr<CudaDevice> make_null_device(const ExecutorSpec& spec, size_t rank);

}  // namespace enginery
