#include "cuda_driver.h"

#include <dlfcn.h>

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
