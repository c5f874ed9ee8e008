#include "driver_device.h"

#include <algorithm>

#include "cubin.h"
#include "errors.h"

namespace enginery {
namespace {

// More dynamic shared memory than this a function must be allowed.
constexpr int64_t kOrdinarySharedBytes = 48 << 10;

std::string in_gib(int64_t bytes) {
    const int64_t hundredths = bytes / ((int64_t{1} << 30) / 100);
    const std::string rest = std::to_string(hundredths % 100);
    return std::to_string(hundredths / 100) + (rest.size() < 2 ? ".0" : ".") + rest + " GiB";
}

std::string capability(int32_t arch) { return std::to_string(arch / 10) + "." + std::to_string(arch % 10); }

// Machine code for 8.x runs on every later 8.x; from 9.0 on it is made for one architecture alone.
bool runs_on(int32_t built, int32_t found) {
    return built == found || (built / 10 == 8 && found / 10 == 8 && built <= found);
}

void check_gpu(const CudaSpec& spec, const cuda::GpuInfo& gpu) {
    if (!runs_on(spec.arch, gpu.arch)) {
        throw TargetError("This engine was built for compute capability " + capability(spec.arch) +
                          "; this machine's " + gpu.name + " has " + capability(gpu.arch) +
                          ". Build one with --target cuda-sm" + std::to_string(gpu.arch) + ".");
    }
    for (const KernelSpec& kernel : spec.kernels) {
        if (kernel.shared_bytes <= gpu.shared_bytes) continue;
        throw TargetError("Kernel " + kernel.name + " was built for " + std::to_string(kernel.shared_bytes) +
                          " bytes of shared memory; this machine's " + gpu.name + " has " +
                          std::to_string(gpu.shared_bytes) + ". Build one with --target cuda-sm" +
                          std::to_string(gpu.arch) + ".");
    }
}

}  // namespace

DriverDevice::DriverDevice(const ExecutorSpec& spec, size_t rank)
    : driver_(cuda::Driver::get()), gpu_(cuda::Gpu::get(spec.ranks[rank].gpu)) {
    gpu_.make_current();
    check_gpu(spec.cuda, gpu_.info());
    driver_.check(driver_.cuStreamCreate(&stream_, cuda::kStreamNonBlocking), "cuStreamCreate");
    for (cuda::Event& event : events_) {
        driver_.check(driver_.cuEventCreate(&event, cuda::kEventDisableTiming), "cuEventCreate");
    }
}

// Frees what it can; a GPU that has failed refuses everything.
DriverDevice::~DriverDevice() {
    try {
        gpu_.make_current();
    } catch (const EngineryError&) {
        return;
    }
    driver_.cuStreamSynchronize(stream_);
    for (const cuda::GraphExec graph : graphs_) driver_.cuGraphExecDestroy(graph);
    for (const cuda::Module module : modules_) driver_.cuModuleUnload(module);
    for (const cuda::DevicePointer memory : allocations_) driver_.cuMemFree_v2(memory);
    for (std::byte* memory : pinned_) driver_.cuMemFreeHost(memory);
    for (const cuda::Event event : events_) driver_.cuEventDestroy_v2(event);
    driver_.cuStreamDestroy_v2(stream_);
}

void DriverDevice::connect(const std::vector<CudaDevice*>& ranks) {
    for (CudaDevice* device : ranks) {
        if (const auto* other = dynamic_cast<const DriverDevice*>(device)) gpu_.reach(other->gpu_);
    }
}

Address DriverDevice::allocate(int64_t bytes, const std::string& purpose) {
    cuda::DevicePointer memory = 0;
    const cuda::Result result = driver_.cuMemAlloc_v2(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    if (result == cuda::kErrorOutOfMemory) {
        const cuda::GpuInfo found = gpu_.info();
        throw CapacityError("The GPU has no memory for " + purpose + ": " + in_gib(bytes) + " are needed, " +
                            in_gib(found.free_bytes) + " of its " + in_gib(found.total_bytes) +
                            " are free. Give a smaller --gpu-memory-utilization, --kv-cache-memory-bytes or "
                            "--max-num-batched-tokens, or end what else uses it (nvidia-smi shows that).");
    }
    driver_.check(result, "cuMemAlloc of " + std::to_string(bytes) + " bytes for " + purpose);
    allocations_.push_back(memory);
    return memory;
}

std::byte* DriverDevice::allocate_pinned(int64_t bytes, const std::string& purpose) {
    void* memory = nullptr;
    const cuda::Result result = driver_.cuMemHostAlloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1)), 0);
    if (result != cuda::kSuccess) {
        throw CapacityError("The host has no memory that the GPU can reach for " + purpose + ": " + in_gib(bytes) +
                            " are needed; the driver says " + driver_.describe(result) +
                            ". Give a smaller --max-num-seqs or --max-num-batched-tokens.");
    }
    pinned_.push_back(static_cast<std::byte*>(memory));
    return pinned_.back();
}

void DriverDevice::free_pinned(std::byte* memory) {
    std::erase(pinned_, memory);
    driver_.cuMemFreeHost(memory);
}

void DriverDevice::copy_to_device(Address to, const std::byte* from, int64_t bytes) {
    driver_.check(driver_.cuMemcpyHtoDAsync_v2(to, from, static_cast<size_t>(bytes), stream_), "cuMemcpyHtoDAsync");
}

void DriverDevice::copy_to_host(std::byte* to, Address from, int64_t bytes) {
    driver_.check(driver_.cuMemcpyDtoHAsync_v2(to, from, static_cast<size_t>(bytes), stream_), "cuMemcpyDtoHAsync");
}

void DriverDevice::fill_zero(Address at, int64_t bytes) {
    driver_.check(driver_.cuMemsetD8Async(at, 0, static_cast<size_t>(bytes), stream_), "cuMemsetD8Async");
}

void DriverDevice::synchronize() { driver_.check(driver_.cuStreamSynchronize(stream_), "cuStreamSynchronize"); }

void DriverDevice::mark(size_t number) {
    driver_.check(driver_.cuEventRecord(events_[number], stream_), "cuEventRecord");
}

void DriverDevice::wait(size_t number) {
    driver_.check(driver_.cuEventSynchronize(events_[number]), "cuEventSynchronize");
}

bool DriverDevice::has_come(size_t number) { return driver_.cuEventQuery(events_[number]) != cuda::kErrorNotReady; }

int32_t DriverDevice::load_kernel(const KernelSpec& kernel) {
    check_cubin(kernel.cubin, "The machine code of kernel " + kernel.name);
    const auto refuse = [&](cuda::Result result, const char* what) {
        if (result == cuda::kSuccess) return;
        throw EngineFormatError(
            "Kernel " + kernel.name + ": " + what + " says " + driver_.describe(result) +
            ". The engine is damaged, or its kernels are newer than this driver: build it again, or "
            "update the driver.");
    };
    cuda::Module module = nullptr;
    refuse(driver_.cuModuleLoadData(&module, kernel.cubin.data()), "cuModuleLoadData");
    modules_.push_back(module);
    cuda::Function function = nullptr;
    refuse(driver_.cuModuleGetFunction(&function, module, kernel.symbol.c_str()), "cuModuleGetFunction");
    // Now, for a function that is loaded lazily cannot be captured.
    refuse(driver_.cuFuncLoad(function), "cuFuncLoad");
    if (kernel.shared_bytes > kOrdinarySharedBytes) {
        refuse(driver_.cuFuncSetAttribute(function, cuda::kFunctionSharedBytes, static_cast<int>(kernel.shared_bytes)),
               "cuFuncSetAttribute");
    }
    check_parameters(kernel, function);
    kernels_.push_back({&kernel, function});
    return static_cast<int32_t>(kernels_.size() - 1);
}

void DriverDevice::check_parameters(const KernelSpec& kernel, cuda::Function function) const {
    std::string wanted, found;
    const auto add = [](std::string& list, size_t bytes) {
        list += (list.empty() ? "" : ", ") + std::to_string(bytes);
    };
    for (const ParameterKind kind : kernel.parameters) add(wanted, kind == ParameterKind::kPointer ? 8 : 4);
    for (int32_t i = 0; i < kernel.hidden; ++i) add(wanted, 8);
    size_t offset = 0, bytes = 0;
    for (size_t index = 0; driver_.cuFuncGetParamInfo(function, index, &offset, &bytes) == cuda::kSuccess; ++index) {
        add(found, bytes);
    }
    if (wanted == found) return;
    throw EngineFormatError("Kernel " + kernel.name + " takes arguments of " + found +
                            " bytes; the plan gives some of " + wanted + ". The engine is damaged: build it again.");
}

void DriverDevice::launch(const DeviceLaunch& launch) {
    const LoadedKernel& kernel = kernels_[static_cast<size_t>(launch.kernel)];
    uint64_t nothing = 0;
    arguments_.clear();
    for (const LaunchArgument& argument : launch.arguments) {
        arguments_.push_back(const_cast<uint64_t*>(&argument.bits));  // the driver only reads them
    }
    for (int32_t i = 0; i < kernel.spec->hidden; ++i) arguments_.push_back(&nothing);
    cuda::LaunchAttribute pdl{};
    pdl.id = cuda::kLaunchAttributePdl;
    pdl.value.pdl_allowed = 1;
    const auto axis = [&](size_t index) { return static_cast<unsigned>(launch.grid[index]); };
    const cuda::LaunchConfig config{axis(0),
                                    axis(1),
                                    axis(2),
                                    static_cast<unsigned>(kernel.spec->num_warps * 32),
                                    1,
                                    1,
                                    static_cast<unsigned>(kernel.spec->shared_bytes),
                                    stream_,
                                    &pdl,
                                    kernel.spec->pdl ? 1U : 0U};
    const cuda::Result result = driver_.cuLaunchKernelEx(&config, kernel.function, arguments_.data(), nullptr);
    if (result != cuda::kSuccess) driver_.check(result, "the launch of " + kernel.spec->name);
}

void DriverDevice::begin_capture() {
    driver_.check(driver_.cuStreamBeginCapture_v2(stream_, cuda::kCaptureThreadLocal), "cuStreamBeginCapture");
}

int32_t DriverDevice::end_capture() {
    cuda::Graph graph = nullptr;
    driver_.check(driver_.cuStreamEndCapture(stream_, &graph), "cuStreamEndCapture");
    cuda::GraphExec executable = nullptr;
    const cuda::Result result = driver_.cuGraphInstantiateWithFlags(&executable, graph, 0);
    driver_.cuGraphDestroy(graph);
    driver_.check(result, "cuGraphInstantiate");
    graphs_.push_back(executable);
    return static_cast<int32_t>(graphs_.size() - 1);
}

void DriverDevice::abandon_capture() {
    cuda::Graph graph = nullptr;
    driver_.cuStreamEndCapture(stream_, &graph);
    if (graph != nullptr) driver_.cuGraphDestroy(graph);
}

void DriverDevice::replay(int32_t graph) {
    driver_.check(driver_.cuGraphLaunch(graphs_[static_cast<size_t>(graph)], stream_), "cuGraphLaunch");
}

std::unique_ptr<CudaDevice> make_driver_device(const ExecutorSpec& spec, size_t rank) {
    return std::make_unique<DriverDevice>(spec, rank);
}

}  // namespace enginery
