// What libnccl.so.2 exports, beside the driver without a GPU (fake_cuda.cpp): it sums nothing. It writes down, in the
// driver's log, what each rank asks of it, and refuses what NCCL would refuse.
//
// $FAKE_NCCL_VERSION changes what it says of itself; $FAKE_NCCL_INIT and $FAKE_NCCL_SUM name a rank whose call fails.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "runtime/csrc/nccl.h"

namespace enginery::nccl {
struct CommHandle {
    int rank;
    int gpu;
};
}  // namespace enginery::nccl

namespace {

using namespace enginery::nccl;

constexpr Result kUnhandledCudaError = 1;
constexpr Result kInvalidArgument = 4;
constexpr Result kInvalidUsage = 5;
constexpr Result kTimeout = 8;
constexpr std::chrono::seconds kLongest{20};

std::mutex mutex;
std::condition_variable changed;
std::map<std::string, std::set<int>> joined;  // ranks by id
std::map<Comm, long> sums;                    // that each rank has begun

long setting(const char* name, long otherwise) {
    const char* value = std::getenv(name);
    return value != nullptr ? std::atol(value) : otherwise;
}

template <typename T>
T driver(const char* name) {
    static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<T>(dlsym(library, name));
}

int gpu() { return driver<int (*)()>("fake_cuda_gpu")(); }

void log(int rank, const std::string& line) {
    const std::string all = "nccl rank " + std::to_string(rank) + " gpu " + std::to_string(gpu()) + " " + line;
    driver<void (*)(const char*)>("fake_cuda_log")(all.c_str());
}

bool holds(const void* address, size_t bytes) {
    return driver<bool (*)(unsigned long long, size_t)>("fake_cuda_holds")(
        reinterpret_cast<unsigned long long>(address), bytes);
}

// Sums end when all ranks have begun them.
void tell_who_waits() {
    long least = 0;
    for (const auto& [comm, count] : sums) least = comm == sums.begin()->first ? count : std::min(least, count);
    for (const auto& [comm, count] : sums) driver<void (*)(int, bool)>("fake_cuda_hang")(comm->gpu, count > least);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Result ncclGetVersion(int* version) {
    *version = static_cast<int>(setting("FAKE_NCCL_VERSION", 22703));
    return kSuccess;
}
EXPORT const char* ncclGetErrorString(Result) { return "a fake error"; }
EXPORT const char* ncclGetLastError(Comm) { return "as the fake library says"; }
EXPORT Result ncclGetUniqueId(UniqueId* id) {
    std::memset(id->bytes, 'i', sizeof(id->bytes));
    return kSuccess;
}
// Returns when all ranks have come, as NCCL does.
EXPORT Result ncclCommInitRank(Comm* comm, int world_size, UniqueId id, int rank) {
    if (rank < 0 || rank >= world_size || gpu() < 0) return kInvalidArgument;
    std::unique_lock lock(mutex);
    std::set<int>& ranks = joined[std::string(id.bytes, sizeof(id.bytes))];
    if (!ranks.insert(rank).second) return kInvalidUsage;
    changed.notify_all();
    const auto all = [&] { return ranks.size() == static_cast<size_t>(world_size); };
    if (!changed.wait_for(lock, kLongest, all)) return kTimeout;
    if (rank == setting("FAKE_NCCL_INIT", -1)) return kUnhandledCudaError;
    log(rank, "joins " + std::to_string(world_size));
    *comm = new CommHandle{rank, gpu()};
    sums[*comm] = 0;
    return kSuccess;
}
EXPORT Result ncclCommAbort(Comm comm) {
    if (comm == nullptr) return kInvalidArgument;
    log(comm->rank, "leaves");
    const std::lock_guard lock(mutex);
    driver<void (*)(int, bool)>("fake_cuda_hang")(comm->gpu, false);
    sums.erase(comm);
    delete comm;
    return kSuccess;
}
#ifndef FAKE_NCCL_IS_OLD
EXPORT Result ncclAllReduce(const void* part, void* sum, size_t count, int dtype, int op, Comm comm,
                            enginery::cuda::Stream stream) {
    if (dtype != kBfloat16 || op != kSum || comm->gpu != gpu()) return kInvalidArgument;
    if (!holds(part, 2 * count) || !holds(sum, 2 * count)) return kInvalidArgument;
    if (driver<bool (*)()>("fake_cuda_captures")()) return kInvalidUsage;
    if (comm->rank == setting("FAKE_NCCL_SUM", -1)) return kUnhandledCudaError;
    const auto from = reinterpret_cast<unsigned long long>(part), to = reinterpret_cast<unsigned long long>(sum);
    log(comm->rank, "sums " + std::to_string(count) + " stream " +
                        std::to_string(reinterpret_cast<unsigned long long>(stream)) + " from " + std::to_string(from) +
                        " to " + std::to_string(to));
    const std::lock_guard lock(mutex);
    ++sums[comm];
    tell_who_waits();
    return kSuccess;
}
#endif
