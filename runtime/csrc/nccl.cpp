#include "nccl.h"

#include <dlfcn.h>

#include <utility>

#include "errors.h"

namespace enginery::nccl {
namespace {

constexpr const char* kLibrary = "libnccl.so.2";
// The first that was made for Hopper.
constexpr int kOldest = 21800;

std::string version_name(int version) {
    const int major = version < 10000 ? 1000 : 10000;  // how 2.8 and older say it
    return std::to_string(version / major) + "." + std::to_string(version % major / 100) + "." +
           std::to_string(version % 100);
}

std::string text_of(const char* text) { return text != nullptr ? text : ""; }

}  // namespace

const Library& Library::get() {
    static const Library library;
    return library;
}

Library::Library() {
    // Never closed: it has threads of its own.
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        fault_ = text_of(dlerror());
        return;
    }
#define ENGINERY_NCCL_LOAD(function, result, parameters)                        \
    function = reinterpret_cast<decltype(function)>(dlsym(library, #function)); \
    if (function == nullptr) {                                                  \
        fault_ = std::string(kLibrary) + " is too old: it has no " #function;   \
        return;                                                                 \
    }
    ENGINERY_NCCL_FUNCTIONS(ENGINERY_NCCL_LOAD)
#undef ENGINERY_NCCL_LOAD
    int version = 0;
    if (ncclGetVersion(&version) != kSuccess || version < kOldest) {
        fault_ = std::string(kLibrary) + " is too old: " + version_name(version) + ", wanted " + version_name(kOldest) +
                 " or newer";
        return;
    }
    name_ = "NCCL " + version_name(version);
}

UniqueId Library::make_id() const {
    UniqueId id{};
    check(ncclGetUniqueId(&id), "The ranks", "ncclGetUniqueId");
    return id;
}

void Library::check(Result result, const std::string& who, const char* what) const {
    if (result == kSuccess) return;
    std::string detail = text_of(ncclGetLastError(nullptr));
    if (!detail.empty()) detail = ": " + detail;
    throw EngineryError(who + " cannot use " + name_ + ": " + what + " says " + text_of(ncclGetErrorString(result)) +
                        " (" + std::to_string(result) + ")" + detail + ". NCCL_DEBUG=WARN tells more; without " +
                        kLibrary + " kernels do its work.");
}

Communicator::Communicator(const Library& library, const UniqueId& id, int32_t rank, int32_t world_size,
                           std::string who)
    : library_(library), who_(std::move(who)) {
    library_.check(library_.ncclCommInitRank(&comm_, world_size, id, rank), who_, "ncclCommInitRank");
}

Communicator::~Communicator() { library_.ncclCommAbort(comm_); }

void Communicator::sum(cuda::DevicePointer part, cuda::DevicePointer sum, size_t elements, cuda::Stream stream) {
    library_.check(library_.ncclAllReduce(reinterpret_cast<const void*>(part), reinterpret_cast<void*>(sum), elements,
                                          kBfloat16, kSum, comm_, stream),
                   who_, "ncclAllReduce");
}

}  // namespace enginery::nccl
