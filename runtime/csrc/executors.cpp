#include "executors.h"

#include <nanobind/nanobind.h>

#include <map>

#include "cuda_device.h"

namespace enginery {

ExecutorFactory find_executor(const std::string& name) {
    static const std::map<std::string, ExecutorFactory> executors = {
        {"cpu", make_cpu_executor},
        {"cuda", [](const ExecutorSpec& spec) { return make_cuda_executor(spec, make_driver_device(spec)); }},
        {"null", make_null_executor},
        {"cuda-null", [](const ExecutorSpec& spec) { return make_cuda_executor(spec, make_null_device(spec)); }},
    };
    const auto found = executors.find(name);
    if (found != executors.end()) return found->second;
    const std::string wanted = "', wanted 'cpu', 'cuda', 'null' or 'cuda-null'";
    throw nanobind::type_error(("executor is '" + name + wanted).c_str());
}

}  // namespace enginery
