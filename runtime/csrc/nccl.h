// NCCL, NVIDIA's library of collectives, opened when it is first needed: a machine may have none.
//
// The declarations are our own, of what NCCL promises never to change; tests compare them with NVIDIA's nccl.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_driver.h"

namespace enginery::nccl {

using Result = int;
using Comm = struct CommHandle*;

constexpr Result kSuccess = 0;
constexpr int kBfloat16 = 9;
constexpr int kSum = 0;

// Where the ranks of one communicator find each other.
struct UniqueId {
    char bytes[128];
};

#define ENGINERY_NCCL_FUNCTIONS(X)                           \
    X(ncclGetVersion, Result, (int*))                        \
    X(ncclGetErrorString, const char*, (Result))             \
    X(ncclGetLastError, const char*, (Comm))                 \
    X(ncclGetUniqueId, Result, (UniqueId*))                  \
    X(ncclCommInitRank, Result, (Comm*, int, UniqueId, int)) \
    X(ncclCommAbort, Result, (Comm))                         \
    X(ncclAllReduce, Result, (const void*, void*, size_t, int, int, Comm, cuda::Stream))

class Library {
  public:
    // Looked for once.
    static const Library& get();

    // Why it is not used; empty where it is.
    const std::string& fault() const { return fault_; }
    // "NCCL 2.27.3".
    const std::string& name() const { return name_; }

    UniqueId make_id() const;

    // Throws EngineryError, unless `result` is success. who: which rank, in the message; what: the function.
    void check(Result result, const std::string& who, const char* what) const;

#define ENGINERY_NCCL_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
    ENGINERY_NCCL_FUNCTIONS(ENGINERY_NCCL_MEMBER)
#undef ENGINERY_NCCL_MEMBER

  private:
    Library();

    std::string fault_;
    std::string name_;
};

// One rank's end of what connects all. Its functions are called by every rank, each on its own thread, whose current
// context is that of the rank's GPU, at the same time and in the same order.
class Communicator {
  public:
    // who: this rank, in messages. Throws EngineryError.
    Communicator(const Library& library, const UniqueId& id, int32_t rank, int32_t world_size, std::string who);
    // Ends what waits for other ranks.
    ~Communicator();
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    // Enqueues: the sum of all ranks' `elements` bf16 at `part` into `sum`. Throws EngineryError.
    void sum(cuda::DevicePointer part, cuda::DevicePointer sum, size_t elements, cuda::Stream stream);

  private:
    const Library& library_;
    const std::string who_;
    Comm comm_ = nullptr;
};

}  // namespace enginery::nccl
