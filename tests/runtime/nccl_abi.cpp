// Compiled with NVIDIA's nccl.h: the declarations of nccl.h are its own.
#include <nccl.h>

#include <type_traits>

#include "runtime/csrc/nccl.h"

namespace mine = enginery::nccl;

static_assert(sizeof(ncclResult_t) == sizeof(mine::Result) && sizeof(ncclComm_t) == sizeof(mine::Comm));
static_assert(sizeof(ncclDataType_t) == sizeof(int) && sizeof(ncclRedOp_t) == sizeof(int));
static_assert(sizeof(ncclUniqueId) == sizeof(mine::UniqueId) && alignof(ncclUniqueId) == alignof(mine::UniqueId));
static_assert(ncclSuccess == mine::kSuccess);
static_assert(ncclBfloat16 == mine::kBfloat16);
static_assert(ncclSum == mine::kSum);

// A parameter of theirs as ours: integers of one size are the same to the caller, so are all pointers.
template <typename Theirs, typename Ours>
constexpr bool kSame = sizeof(Theirs) == sizeof(Ours) && std::is_pointer_v<Theirs> == std::is_pointer_v<Ours> &&
                       std::is_class_v<Theirs> == std::is_class_v<Ours>;

template <typename Theirs, typename Ours>
struct Same : std::false_type {};
template <typename TheirResult, typename... Theirs, typename OurResult, typename... Ours>
struct Same<TheirResult(Theirs...), OurResult(Ours...)> {
    static constexpr bool value = [] {
        if constexpr (sizeof...(Theirs) == sizeof...(Ours)) {
            return kSame<TheirResult, OurResult> && (kSame<Theirs, Ours> && ...);
        } else {
            return false;
        }
    }();
};

#define SAME_FUNCTION(name, result, parameters) \
    static_assert(Same<std::remove_pointer_t<decltype(&::name)>, result parameters>::value, #name);
namespace enginery::nccl {
ENGINERY_NCCL_FUNCTIONS(SAME_FUNCTION)
}  // namespace enginery::nccl

int main() {}
