#include "executors.h"

#include <nanobind/nanobind.h>

#include <map>

#include "cuda_device.h"

namespace enginery {
namespace {

using DeviceFactory = std::unique_ptr<CudaDevice> (*)(const ExecutorSpec& spec, size_t rank);

std::vector<std::unique_ptr<CudaDevice>> devices_of(const ExecutorSpec& spec, DeviceFactory make) {
    std::vector<std::unique_ptr<CudaDevice>> devices;
    for (size_t rank = 0; rank < spec.ranks.size(); ++rank) devices.push_back(make(spec, rank));
    return devices;
}

}  // namespace

ExecutorFactory find_executor(const std::string& name) {
    static const std::map<std::string, ExecutorFactory> executors = {
        {"cpu", make_cpu_executor},
        {"cuda",
         [](const ExecutorSpec& spec) { return make_cuda_executor(spec, devices_of(spec, make_driver_device)); }},
        {"null", make_null_executor},
        {"cuda-null",
         [](const ExecutorSpec& spec) { return make_cuda_executor(spec, devices_of(spec, make_null_device)); }},
    };
    const auto found = executors.find(name);
    if (found != executors.end()) return found->second;
    const std::string wanted = "', wanted 'cpu', 'cuda', 'null' or 'cuda-null'";
    throw nanobind::type_error(("executor is '" + name + wanted).c_str());
}

}  // namespace enginery
