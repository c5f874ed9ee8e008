#include "cuda_gpu.h"

#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "errors.h"

namespace enginery::cuda {

int32_t Gpu::count() {
    const Driver& driver = Driver::get();
    int count = 0;
    if (const Result result = driver.cuDeviceGetCount(&count); result != kSuccess || count < 1) {
        throw TargetError(
            "The NVIDIA driver shows no GPU to this process. See what nvidia-smi lists and what CUDA_VISIBLE_DEVICES "
            "leaves of it; a container must be given GPUs (docker run --gpus all).");
    }
    return count;
}

const Gpu& Gpu::get(int32_t number) {
    static std::mutex mutex;
    static std::map<int32_t, std::unique_ptr<const Gpu>> gpus;
    const std::lock_guard lock(mutex);
    auto found = gpus.find(number);
    if (found == gpus.end()) found = gpus.emplace(number, std::unique_ptr<const Gpu>(new Gpu(number))).first;
    return *found->second;
}

Gpu::Gpu(int32_t number) : driver_(Driver::get()) {
    if (const int32_t shown = count(); number < 0 || number >= shown) {
        throw TargetError("There is no GPU " + std::to_string(number) + ": the NVIDIA driver shows " +
                          std::to_string(shown) +
                          ", counted from 0. Name others with --gpus; what it shows, "
                          "CUDA_VISIBLE_DEVICES decides.");
    }
    driver_.check(driver_.cuDeviceGet(&device_, number), "cuDeviceGet");
    if (const Result result = driver_.cuDevicePrimaryCtxRetain(&context_, device_); result != kSuccess) {
        throw TargetError("The GPU cannot be used: the driver says " + driver_.describe(result) +
                          ". Another process may hold it, or all of its memory: see nvidia-smi.");
    }
}

void Gpu::make_current() const {
    if (const Result result = driver_.cuCtxSetCurrent(context_); result != kSuccess) {
        throw TargetError("The GPU cannot be used any more: the driver says " + driver_.describe(result) +
                          ". Restart the server.");
    }
}

GpuInfo Gpu::info() const {
    make_current();
    GpuInfo info;
    std::array<char, 256> name{};
    driver_.check(driver_.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device_), "cuDeviceGetName");
    info.name = name.data();
    driver_.check(driver_.cuDriverGetVersion(&info.driver), "cuDriverGetVersion");
    const auto attribute = [this](int number) {
        int value = 0;
        driver_.check(driver_.cuDeviceGetAttribute(&value, number, device_), "cuDeviceGetAttribute");
        return value;
    };
    info.arch = attribute(kAttributeMajor) * 10 + attribute(kAttributeMinor);
    info.shared_bytes = attribute(kAttributeSharedBytes);
    size_t free_bytes = 0, total_bytes = 0;
    driver_.check(driver_.cuMemGetInfo_v2(&free_bytes, &total_bytes), "cuMemGetInfo");
    info.free_bytes = static_cast<int64_t>(free_bytes);
    info.total_bytes = static_cast<int64_t>(total_bytes);
    return info;
}

void Gpu::reach(const Gpu& other) const {
    if (device_ == other.device_) return;
    int can = 0;
    driver_.check(driver_.cuDeviceCanAccessPeer(&can, device_, other.device_), "cuDeviceCanAccessPeer");
    if (can == 0) {
        throw TargetError(
            "GPU " + std::to_string(device_) + " cannot read the memory of GPU " + std::to_string(other.device_) +
            ", which ranks of one engine must (nvidia-smi topo -p2p r shows which can). Choose others with "
            "--gpus, or build an engine for one GPU.");
    }
    make_current();
    const Result result = driver_.cuCtxEnablePeerAccess(other.context_, 0);
    if (result == kSuccess || result == kErrorPeerAccessAlreadyEnabled) return;
    throw TargetError("GPU " + std::to_string(device_) + " cannot read the memory of GPU " +
                      std::to_string(other.device_) + ": cuCtxEnablePeerAccess says " + driver_.describe(result) +
                      ". Choose others with --gpus, or build an engine for one GPU.");
}

}  // namespace enginery::cuda
