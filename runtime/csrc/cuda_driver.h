// The CUDA driver, opened when it is first needed: enginery is built and installed without any part of CUDA.
//
// The declarations are our own, of what the driver promises never to change; tests compare them with NVIDIA's cuda.h.
// Names with _v2 are the symbols that libcuda exports for the functions that cuda.h calls without.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace enginery::cuda {

using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using Context = struct ContextHandle*;
using Module = struct ModuleHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;
using Event = struct EventHandle*;
using Graph = struct GraphHandle*;
using GraphExec = struct GraphExecHandle*;

constexpr Result kSuccess = 0;
constexpr Result kErrorInvalidValue = 1;
constexpr Result kErrorOutOfMemory = 2;
constexpr Result kErrorNoDevice = 100;
constexpr Result kErrorNotReady = 600;
constexpr Result kErrorPeerAccessAlreadyEnabled = 704;

constexpr int kAttributeMajor = 75;  // of the compute capability
constexpr int kAttributeMinor = 76;
constexpr int kAttributeSharedBytes = 97;  // per block, opted in
constexpr int kFunctionSharedBytes = 8;    // the most dynamic shared memory of a function
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr int kCaptureThreadLocal = 1;
constexpr int kLaunchAttributePdl = 6;  // programmatic stream serialization

union LaunchAttributeValue {
    char bytes[64];
    unsigned long long alignment;
    int pdl_allowed;
};

struct LaunchAttribute {
    int id;
    char padding[4];
    LaunchAttributeValue value;
};

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};

#define ENGINERY_CUDA_FUNCTIONS(X)                                          \
    X(cuInit, (unsigned))                                                   \
    X(cuDriverGetVersion, (int*))                                           \
    X(cuGetErrorName, (Result, const char**))                               \
    X(cuGetErrorString, (Result, const char**))                             \
    X(cuDeviceGetCount, (int*))                                             \
    X(cuDeviceGet, (Device*, int))                                          \
    X(cuDeviceGetName, (char*, int, Device))                                \
    X(cuDeviceGetAttribute, (int*, int, Device))                            \
    X(cuDevicePrimaryCtxRetain, (Context*, Device))                         \
    X(cuCtxSetCurrent, (Context))                                           \
    X(cuDeviceCanAccessPeer, (int*, Device, Device))                        \
    X(cuCtxEnablePeerAccess, (Context, unsigned))                           \
    X(cuMemGetInfo_v2, (size_t*, size_t*))                                  \
    X(cuMemAlloc_v2, (DevicePointer*, size_t))                              \
    X(cuMemFree_v2, (DevicePointer))                                        \
    X(cuMemHostAlloc, (void**, size_t, unsigned))                           \
    X(cuMemFreeHost, (void*))                                               \
    X(cuMemcpyHtoDAsync_v2, (DevicePointer, const void*, size_t, Stream))   \
    X(cuMemcpyDtoHAsync_v2, (void*, DevicePointer, size_t, Stream))         \
    X(cuMemsetD8Async, (DevicePointer, unsigned char, size_t, Stream))      \
    X(cuModuleLoadData, (Module*, const void*))                             \
    X(cuModuleUnload, (Module))                                             \
    X(cuModuleGetFunction, (Function*, Module, const char*))                \
    X(cuFuncLoad, (Function))                                               \
    X(cuFuncSetAttribute, (Function, int, int))                             \
    X(cuFuncGetParamInfo, (Function, size_t, size_t*, size_t*))             \
    X(cuLaunchKernelEx, (const LaunchConfig*, Function, void**, void**))    \
    X(cuStreamCreate, (Stream*, unsigned))                                  \
    X(cuStreamDestroy_v2, (Stream))                                         \
    X(cuStreamSynchronize, (Stream))                                        \
    X(cuEventCreate, (Event*, unsigned))                                    \
    X(cuEventDestroy_v2, (Event))                                           \
    X(cuEventRecord, (Event, Stream))                                       \
    X(cuEventQuery, (Event))                                                \
    X(cuEventSynchronize, (Event))                                          \
    X(cuStreamBeginCapture_v2, (Stream, int))                               \
    X(cuStreamEndCapture, (Stream, Graph*))                                 \
    X(cuGraphInstantiateWithFlags, (GraphExec*, Graph, unsigned long long)) \
    X(cuGraphLaunch, (GraphExec, Stream))                                   \
    X(cuGraphExecDestroy, (GraphExec))                                      \
    X(cuGraphDestroy, (Graph))

class Driver {
  public:
    // Throws TargetError where there is no driver, one that does not start, or is too old; the next call tries again.
    static const Driver& get();

#define ENGINERY_CUDA_MEMBER(name, parameters) Result(*name) parameters = nullptr;
    ENGINERY_CUDA_FUNCTIONS(ENGINERY_CUDA_MEMBER)
#undef ENGINERY_CUDA_MEMBER

    // Throws EngineryError naming what failed, unless `result` is success.
    void check(Result result, const std::string& what) const;
    // "CUDA_ERROR_...: as the driver explains it".
    std::string describe(Result result) const;

  private:
    Driver();
    void open();
    void require_version() const;
};

}  // namespace enginery::cuda
