// A driver without a GPU: what libcuda.so.1 exports, on the host's memory. It runs no kernel; it writes down, one line
// each in the file $FAKE_CUDA_LOG, what enginery asks of it, and refuses what a driver would refuse.
//
// $FAKE_CUDA_ARCH, _VERSION, _COUNT, _MEMORY (of each GPU), _PEERS, _LATE and _INIT change what it says of itself.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "runtime/csrc/cuda_driver.h"

namespace {

using namespace enginery::cuda;

constexpr Result kNotInitialized = 3;
constexpr Result kInvalidImage = 200;
constexpr Result kInvalidContext = 201;
constexpr Result kNotFound = 500;
constexpr Result kCaptureInvalidated = 901;

struct FakeFunction {
    std::string name;
    std::vector<size_t> parameters;
    long shared_bytes = 48 << 10;
    bool loaded = false;
};

long setting(const char* name, long otherwise) {
    const char* value = std::getenv(name);
    return value != nullptr ? std::atol(value) : otherwise;
}

void log(const std::string& line) {
    static std::FILE* file = [] {
        const char* path = std::getenv("FAKE_CUDA_LOG");
        return std::fopen(path != nullptr ? path : "/dev/null", "w");
    }();
    std::fprintf(file, "%s\n", line.c_str());
    std::fflush(file);
}

struct Memory {
    size_t bytes = 0;
    size_t context = 0;
};

bool is_initialized = false;
std::mutex mutex;                 // of all but what a thread has for itself
thread_local size_t current = 0;  // context: a GPU's number and 1; or none
std::map<DevicePointer, Memory> memory;
std::map<size_t, size_t> used_bytes;  // by context
std::set<std::pair<size_t, size_t>> peers;
std::set<size_t> hanging;  // contexts
// Captures are of a thread, as enginery begins them.
thread_local bool is_capturing = false;
thread_local std::vector<std::string> captured;

bool holds(DevicePointer address, size_t bytes) {
    auto next = memory.upper_bound(address);
    if (next == memory.begin()) return false;
    --next;
    return address + bytes <= next->first + next->second.bytes;
}

#define REQUIRE_CURRENT                          \
    const std::lock_guard lock(mutex);           \
    if (!is_initialized) return kNotInitialized; \
    if (current == 0) return kInvalidContext
// What synchronizes or allocates breaks a capture.
#define REQUIRE_NO_CAPTURE \
    if (is_capturing) return kCaptureInvalidated

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) Result

// These are for fake_nccl.cpp. The log, the calling thread's GPU and whether it captures, and whether memory is
// allocated there.
extern "C" __attribute__((visibility("default"))) void fake_cuda_log(const char* line) {
    const std::lock_guard lock(mutex);
    log(line);
}
// A sum of the GPU waits for another's: whoever waits for that GPU would wait for ever.
extern "C" __attribute__((visibility("default"))) void fake_cuda_hang(int gpu, bool hangs) {
    const std::lock_guard lock(mutex);
    if (hangs) {
        hanging.insert(static_cast<size_t>(gpu) + 1);
    } else {
        hanging.erase(static_cast<size_t>(gpu) + 1);
    }
}
extern "C" __attribute__((visibility("default"))) int fake_cuda_gpu() { return static_cast<int>(current) - 1; }
extern "C" __attribute__((visibility("default"))) bool fake_cuda_captures() { return is_capturing; }
extern "C" __attribute__((visibility("default"))) bool fake_cuda_holds(unsigned long long address, size_t bytes) {
    const std::lock_guard lock(mutex);
    const auto next = memory.upper_bound(address);
    return holds(address, bytes) && std::prev(next)->second.context == current;
}

EXPORT cuInit(unsigned) {
    is_initialized = setting("FAKE_CUDA_INIT", 0) == 0;
    return static_cast<Result>(setting("FAKE_CUDA_INIT", 0));
}
EXPORT cuDriverGetVersion(int* version) {
    *version = static_cast<int>(setting("FAKE_CUDA_VERSION", 13000));
    return kSuccess;
}
EXPORT cuGetErrorName(Result result, const char** name) {
    *name = result == kErrorOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
    return kSuccess;
}
EXPORT cuGetErrorString(Result, const char** text) {
    *text = "as the fake driver says";
    return kSuccess;
}
EXPORT cuDeviceGetCount(int* count) {
    *count = static_cast<int>(setting("FAKE_CUDA_COUNT", 1));
    return kSuccess;
}
EXPORT cuDeviceGet(Device* device, int index) {
    *device = index;
    return kSuccess;
}
EXPORT cuDeviceGetName(char* name, int size, Device) {
    std::snprintf(name, static_cast<size_t>(size), "Fake GPU");
    return kSuccess;
}
EXPORT cuDeviceGetAttribute(int* value, int attribute, Device) {
    const int arch = static_cast<int>(setting("FAKE_CUDA_ARCH", 90));
    if (attribute == kAttributeMajor) *value = arch / 10;
    if (attribute == kAttributeMinor) *value = arch % 10;
    if (attribute == kAttributeSharedBytes) *value = arch == 86 || arch == 89 ? 99 << 10 : 227 << 10;
    return kSuccess;
}
EXPORT cuDevicePrimaryCtxRetain(Context* context, Device device) {
    *context = reinterpret_cast<Context>(static_cast<size_t>(device) + 1);
    return kSuccess;
}
EXPORT cuCtxSetCurrent(Context context) {
    current = reinterpret_cast<size_t>(context);
    return kSuccess;
}
EXPORT cuDeviceCanAccessPeer(int* can, Device device, Device peer) {
    *can = device != peer && setting("FAKE_CUDA_PEERS", 1) != 0 ? 1 : 0;
    return kSuccess;
}
EXPORT cuCtxEnablePeerAccess(Context peer, unsigned flags) {
    REQUIRE_CURRENT;
    const auto other = reinterpret_cast<size_t>(peer);
    if (flags != 0 || other == current) return kErrorInvalidValue;
    if (setting("FAKE_CUDA_PEERS", 1) == 2) return kErrorInvalidValue;
    if (!peers.emplace(current, other).second) return kErrorPeerAccessAlreadyEnabled;
    log("peer " + std::to_string(current - 1) + " reaches " + std::to_string(other - 1));
    return kSuccess;
}
EXPORT cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    REQUIRE_CURRENT;
    *total_bytes = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 4L << 30));
    *free_bytes = *total_bytes - used_bytes[current];
    return kSuccess;
}
EXPORT cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    if (used_bytes[current] + bytes > static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 4L << 30)))
        return kErrorOutOfMemory;
    void* block = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(block, 0x7f, std::min<size_t>(bytes, 1 << 20));
    *pointer = reinterpret_cast<DevicePointer>(block);
    memory[*pointer] = {bytes, current};
    used_bytes[current] += bytes;
    return kSuccess;
}
EXPORT cuMemFree_v2(DevicePointer pointer) {
    REQUIRE_CURRENT;
    const auto found = memory.find(pointer);
    if (found == memory.end()) return kErrorInvalidValue;
    const auto [bytes, context] = found->second;
    used_bytes[context] -= bytes;
    memory.erase(found);
    std::free(reinterpret_cast<void*>(pointer));
    log("free " + std::to_string(used_bytes[context]));
    return kSuccess;
}
EXPORT cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    *pointer = std::calloc(1, bytes);
    return kSuccess;
}
EXPORT cuMemFreeHost(void* pointer) {
    std::free(pointer);
    return kSuccess;
}
EXPORT cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, Stream) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    if (!holds(to, bytes)) return kErrorInvalidValue;
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    log("to_device " + std::to_string(bytes));
    return kSuccess;
}
EXPORT cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, Stream) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    if (!holds(from, bytes)) return kErrorInvalidValue;
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    log("to_host " + std::to_string(bytes));
    return kSuccess;
}
EXPORT cuMemsetD8Async(DevicePointer to, unsigned char value, size_t bytes, Stream) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    if (!holds(to, bytes)) return kErrorInvalidValue;
    // What lies behind is zero as the system gave it; to touch gigabytes of it would take seconds.
    std::memset(reinterpret_cast<void*>(to), value, value == 0 ? std::min<size_t>(bytes, 4 << 20) : bytes);
    return kSuccess;
}
EXPORT cuModuleLoadData(Module* module, const void* image) {
    REQUIRE_CURRENT;
    if (std::memcmp(image,
                    "\x7f"
                    "ELF",
                    4) != 0)
        return kInvalidImage;
    auto* function = new FakeFunction;
    // Behind the file's header and section: cuda_engines.py.
    const std::string text = static_cast<const char*>(image) + 128;
    size_t place = text.find(' ');
    function->name = text.substr(0, place);
    while (place < text.size() && text[place] == ' ') {
        function->parameters.push_back(std::stoul(text.substr(place + 1)));
        place = text.find_first_of(" \n", place + 1);
    }
    *module = reinterpret_cast<Module>(function);
    return kSuccess;
}
EXPORT cuModuleUnload(Module module) {
    log("unload");
    delete reinterpret_cast<FakeFunction*>(module);
    return kSuccess;
}
EXPORT cuModuleGetFunction(Function* function, Module module, const char* name) {
    if (reinterpret_cast<FakeFunction*>(module)->name != name) return kNotFound;
    *function = reinterpret_cast<Function>(module);
    return kSuccess;
}
#ifndef FAKE_CUDA_IS_OLD
EXPORT cuFuncLoad(Function function) {
    reinterpret_cast<FakeFunction*>(function)->loaded = true;
    return kSuccess;
}
#endif
EXPORT cuFuncSetAttribute(Function function, int attribute, int value) {
    if (attribute != kFunctionSharedBytes || value > 227 << 10) return kErrorInvalidValue;
    reinterpret_cast<FakeFunction*>(function)->shared_bytes = value;
    return kSuccess;
}
EXPORT cuFuncGetParamInfo(Function function, size_t index, size_t* offset, size_t* bytes) {
    const auto& parameters = reinterpret_cast<FakeFunction*>(function)->parameters;
    if (index >= parameters.size()) return kErrorInvalidValue;
    *offset = 8 * index;
    *bytes = parameters[index];
    return kSuccess;
}
EXPORT cuLaunchKernelEx(const LaunchConfig* config, Function handle, void** arguments, void**) {
    REQUIRE_CURRENT;
    const auto& function = *reinterpret_cast<FakeFunction*>(handle);
    if (!function.loaded && is_capturing) return kCaptureInvalidated;
    if (config->grid_x == 0 || config->grid_y == 0 || config->grid_z == 0) return kErrorInvalidValue;
    if (config->shared_bytes > static_cast<unsigned long>(function.shared_bytes)) return kErrorInvalidValue;
    std::string line = "launch " + function.name + " grid " + std::to_string(config->grid_x) + " " +
                       std::to_string(config->grid_y) + " " + std::to_string(config->grid_z) + " block " +
                       std::to_string(config->block_x * config->block_y * config->block_z) + " shared " +
                       std::to_string(config->shared_bytes);
    for (unsigned i = 0; i < config->num_attributes; ++i) {
        line += " attribute " + std::to_string(config->attributes[i].id) + "=" +
                std::to_string(config->attributes[i].value.pdl_allowed);
    }
    line += " arguments";
    for (size_t i = 0; i < function.parameters.size(); ++i) {
        unsigned long long bits = 0;
        std::memcpy(&bits, arguments[i], function.parameters[i]);
        // A pointer as what it points at, so that a test can look for it.
        if (function.parameters[i] == 8 && bits != 0) {
            if (!holds(bits, 4)) return kErrorInvalidValue;
            unsigned first = 0;
            std::memcpy(&first, reinterpret_cast<void*>(bits), sizeof(first));
            line += " *" + std::to_string(first);
        } else {
            line += " " + std::to_string(bits);
        }
    }
    if (is_capturing) {
        captured.push_back(line);
    } else {
        log(line);
    }
    return kSuccess;
}
EXPORT cuStreamCreate(Stream* stream, unsigned flags) {
    if (flags != kStreamNonBlocking) return kErrorInvalidValue;
    *stream = reinterpret_cast<Stream>(current);
    return kSuccess;
}
EXPORT cuStreamDestroy_v2(Stream) { return kSuccess; }
EXPORT cuStreamSynchronize(Stream) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    if (hanging.contains(current)) log("waits in vain");
    return static_cast<Result>(setting("FAKE_CUDA_SYNCHRONIZE", 0));
}
EXPORT cuEventCreate(Event* event, unsigned flags) {
    REQUIRE_CURRENT;
    if (flags != kEventDisableTiming) return kErrorInvalidValue;
    *event = reinterpret_cast<Event>(1);
    return kSuccess;
}
EXPORT cuEventDestroy_v2(Event) { return kSuccess; }
EXPORT cuEventRecord(Event event, Stream) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    return event == nullptr ? kErrorInvalidValue : kSuccess;
}
// A GPU fails that is not late.
bool is_late() {
    return hanging.contains(current) || current - 1 == static_cast<size_t>(setting("FAKE_CUDA_LATE", -1));
}
EXPORT cuEventQuery(Event) {
    REQUIRE_CURRENT;
    return is_late() ? kErrorNotReady : kSuccess;
}
EXPORT cuEventSynchronize(Event) {
    REQUIRE_CURRENT;
    REQUIRE_NO_CAPTURE;
    if (is_late()) log("waits in vain");
    return is_late() ? kSuccess : static_cast<Result>(setting("FAKE_CUDA_SYNCHRONIZE", 0));
}
EXPORT cuStreamBeginCapture_v2(Stream, int mode) {
    if (mode != kCaptureThreadLocal) return kErrorInvalidValue;
    is_capturing = true;
    captured.clear();
    return kSuccess;
}
EXPORT cuStreamEndCapture(Stream, Graph* graph) {
    is_capturing = false;
    *graph = reinterpret_cast<Graph>(new std::vector<std::string>(captured));
    return kSuccess;
}
EXPORT cuGraphInstantiateWithFlags(GraphExec* executable, Graph graph, unsigned long long) {
    auto* lines = new std::vector<std::string>(*reinterpret_cast<std::vector<std::string>*>(graph));
    log("graph " + std::to_string(lines->size()));
    *executable = reinterpret_cast<GraphExec>(lines);
    return kSuccess;
}
EXPORT cuGraphLaunch(GraphExec executable, Stream) {
    REQUIRE_CURRENT;
    log("replay " + std::to_string(reinterpret_cast<std::vector<std::string>*>(executable)->size()));
    return kSuccess;
}
EXPORT cuGraphExecDestroy(GraphExec executable) {
    delete reinterpret_cast<std::vector<std::string>*>(executable);
    return kSuccess;
}
EXPORT cuGraphDestroy(Graph graph) {
    delete reinterpret_cast<std::vector<std::string>*>(graph);
    return kSuccess;
}
