// Compiled with NVIDIA's cuda.h: the declarations of cuda_driver.h are its own.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "runtime/csrc/cuda_driver.h"

namespace mine = enginery::cuda;

static_assert(sizeof(CUresult) == sizeof(mine::Result) && sizeof(CUdevice) == sizeof(mine::Device));
static_assert(std::is_same_v<CUdeviceptr, mine::DevicePointer>);

static_assert(CUDA_SUCCESS == mine::kSuccess);
static_assert(CUDA_ERROR_INVALID_VALUE == mine::kErrorInvalidValue);
static_assert(CUDA_ERROR_OUT_OF_MEMORY == mine::kErrorOutOfMemory);
static_assert(CUDA_ERROR_NO_DEVICE == mine::kErrorNoDevice);
static_assert(CUDA_ERROR_NOT_READY == mine::kErrorNotReady);
static_assert(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED == mine::kErrorPeerAccessAlreadyEnabled);
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == mine::kAttributeMajor);
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == mine::kAttributeMinor);
static_assert(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN == mine::kAttributeSharedBytes);
static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == mine::kFunctionSharedBytes);
static_assert(CU_STREAM_NON_BLOCKING == mine::kStreamNonBlocking);
static_assert(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL == mine::kCaptureThreadLocal);
static_assert(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION == mine::kLaunchAttributePdl);

static_assert(sizeof(CUlaunchAttributeValue) == sizeof(mine::LaunchAttributeValue));
static_assert(alignof(CUlaunchAttributeValue) == alignof(mine::LaunchAttributeValue));
static_assert(offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) ==
              offsetof(mine::LaunchAttributeValue, pdl_allowed));
static_assert(sizeof(CUlaunchAttributeValue::programmaticStreamSerializationAllowed) ==
              sizeof(mine::LaunchAttributeValue::pdl_allowed));
static_assert(sizeof(CUlaunchAttribute) == sizeof(mine::LaunchAttribute));
static_assert(offsetof(CUlaunchAttribute, value) == offsetof(mine::LaunchAttribute, value));

#define SAME_PLACE(theirs, ours)                                                            \
    static_assert(offsetof(CUlaunchConfig, theirs) == offsetof(mine::LaunchConfig, ours) && \
                  sizeof(CUlaunchConfig::theirs) == sizeof(mine::LaunchConfig::ours))
static_assert(sizeof(CUlaunchConfig) == sizeof(mine::LaunchConfig));
SAME_PLACE(gridDimX, grid_x);
SAME_PLACE(gridDimY, grid_y);
SAME_PLACE(gridDimZ, grid_z);
SAME_PLACE(blockDimX, block_x);
SAME_PLACE(blockDimY, block_y);
SAME_PLACE(blockDimZ, block_z);
SAME_PLACE(sharedMemBytes, shared_bytes);
SAME_PLACE(hStream, stream);
SAME_PLACE(attrs, attributes);
SAME_PLACE(numAttrs, num_attributes);

// A parameter of theirs as ours: integers of one size are the same to the caller, so are all pointers.
template <typename Theirs, typename Ours>
constexpr bool kSameParameter = sizeof(Theirs) == sizeof(Ours) && std::is_pointer_v<Theirs> == std::is_pointer_v<Ours>;

template <typename Theirs, typename Ours>
struct Same : std::false_type {};
template <typename... Theirs, typename... Ours>
struct Same<CUresult(Theirs...), mine::Result(Ours...)> {
    static constexpr bool value = [] {
        if constexpr (sizeof...(Theirs) == sizeof...(Ours)) {
            return (kSameParameter<Theirs, Ours> && ...);
        } else {
            return false;
        }
    }();
};

// cuda.h calls the symbols with _v2 without it, by macros: both names lead to one declaration.
#define SAME_FUNCTION(name, parameters) \
    static_assert(Same<std::remove_pointer_t<decltype(&::name)>, mine::Result parameters>::value, #name);
namespace enginery::cuda {
ENGINERY_CUDA_FUNCTIONS(SAME_FUNCTION)
}

int main() {}
