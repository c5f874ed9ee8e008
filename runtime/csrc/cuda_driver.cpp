#include "cuda_driver.h"

#include <dlfcn.h>

#include <array>

#include "errors.h"

namespace enginery::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int32_t kOldestCuda = 12040;

std::string version_name(int32_t version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

const std::string kNewDriver = "Install NVIDIA's driver 550 (CUDA " + version_name(kOldestCuda) + ") or newer.";

}  // namespace

const Driver& Driver::get() {
    static const Driver driver;
    return driver;
}

Driver::Driver() {
    open();
    if (const Result result = cuInit(0); result != kSuccess && result != kErrorNoDevice) {
        throw TargetError(
            "The NVIDIA driver does not start: cuInit says " + describe(result) +
            ". See whether nvidia-smi works; after an update of the driver the machine must be restarted.");
    }
    require_version();
    int count = 0;
    if (const Result result = cuDeviceGetCount(&count); result != kSuccess || count < 1) {
        throw TargetError(
            "The NVIDIA driver shows no GPU to this process. See what nvidia-smi lists and what CUDA_VISIBLE_DEVICES "
            "leaves of it; a container must be given GPUs (docker run --gpus all).");
    }
    check(cuDeviceGet(&device_, 0), "cuDeviceGet");
    if (const Result result = cuDevicePrimaryCtxRetain(&context_, device_); result != kSuccess) {
        throw TargetError("The GPU cannot be used: the driver says " + describe(result) +
                          ". Another process may hold it, or all of its memory: see nvidia-smi.");
    }
}

void Driver::open() {
    // Never closed: it has threads of its own.
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = dlerror();
        throw TargetError(std::string("No NVIDIA driver was found: ") + (reason != nullptr ? reason : kLibrary) + ". " +
                          kNewDriver + " In a container, give it GPUs (docker run --gpus all).");
    }
#define ENGINERY_CUDA_LOAD(name, parameters)                                                                    \
    name = reinterpret_cast<decltype(name)>(dlsym(library, #name));                                             \
    if (name == nullptr) {                                                                                      \
        throw TargetError(std::string("The NVIDIA driver is too old: it has no ") + #name + ". " + kNewDriver); \
    }
    ENGINERY_CUDA_FUNCTIONS(ENGINERY_CUDA_LOAD)
#undef ENGINERY_CUDA_LOAD
}

void Driver::require_version() const {
    int version = 0;
    check(cuDriverGetVersion(&version), "cuDriverGetVersion");
    if (version < kOldestCuda) {
        throw TargetError("The NVIDIA driver is too old: it knows CUDA up to " + version_name(version) + ". " +
                          kNewDriver);
    }
}

void Driver::make_current() const {
    if (const Result result = cuCtxSetCurrent(context_); result != kSuccess) {
        throw TargetError("The GPU cannot be used any more: the driver says " + describe(result) +
                          ". Restart the server.");
    }
}

GpuInfo Driver::gpu() const {
    make_current();
    GpuInfo info;
    std::array<char, 256> name{};
    check(cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device_), "cuDeviceGetName");
    info.name = name.data();
    check(cuDriverGetVersion(&info.driver), "cuDriverGetVersion");
    const auto attribute = [this](int number) {
        int value = 0;
        check(cuDeviceGetAttribute(&value, number, device_), "cuDeviceGetAttribute");
        return value;
    };
    info.arch = attribute(kAttributeMajor) * 10 + attribute(kAttributeMinor);
    info.shared_bytes = attribute(kAttributeSharedBytes);
    size_t free_bytes = 0, total_bytes = 0;
    check(cuMemGetInfo_v2(&free_bytes, &total_bytes), "cuMemGetInfo");
    info.free_bytes = static_cast<int64_t>(free_bytes);
    info.total_bytes = static_cast<int64_t>(total_bytes);
    return info;
}

std::string Driver::describe(Result result) const {
    const char *name = nullptr, *text = nullptr;
    cuGetErrorName(result, &name);
    cuGetErrorString(result, &text);
    return std::string(name != nullptr ? name : "an unknown error") + " (" + std::to_string(result) +
           (text != nullptr ? std::string("): ") + text : ")");
}

void Driver::check(Result result, const std::string& what) const {
    if (result != kSuccess) throw EngineryError("The GPU failed: " + what + " says " + describe(result) + ".");
}

}  // namespace enginery::cuda
