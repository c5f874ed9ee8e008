#include "null_device.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cubin.h"
#include "errors.h"
#include "null_step.h"

namespace enginery {
namespace {

constexpr std::array<int64_t, 3> kLargestGrid = {INT32_MAX, UINT16_MAX, UINT16_MAX};

std::string in_bytes(int64_t bytes) { return std::to_string(bytes) + " bytes"; }

const char* name_of(ParameterKind kind) {
    constexpr std::array<const char*, 3> names = {"a pointer", "an i32", "an fp32"};
    return names[static_cast<size_t>(kind)];
}

}  // namespace

NullDevice::NullDevice(const ExecutorSpec& spec, size_t rank)
    : spec_(spec), model_(rank == 0 ? make_null_executor(spec) : nullptr) {}

bool NullDevice::Range::contains(Address at, int64_t count) const {
    return at >= address && count <= bytes && at - address <= static_cast<Address>(bytes - count);
}

Address NullDevice::allocate(int64_t bytes, const std::string& purpose) {
    Mapping memory = Mapping::of_zeros(std::max<int64_t>(bytes, 1), purpose + " on the null device");
    const auto address = reinterpret_cast<Address>(memory.data());
    allocations_.emplace(address, std::move(memory));
    return address;
}

std::byte* NullDevice::allocate_pinned(int64_t bytes, const std::string& purpose) {
    return pinned_.emplace_back(Mapping::of_zeros(std::max<int64_t>(bytes, 1), purpose)).data();
}

void NullDevice::free_pinned(std::byte* memory) {
    std::erase_if(pinned_, [memory](const Mapping& mapping) { return mapping.data() == memory; });
}

bool NullDevice::is_allocated(Address address, int64_t bytes) const {
    auto next = allocations_.upper_bound(address);
    if (next == allocations_.begin()) return false;
    --next;
    return Range{next->first, next->second.bytes()}.contains(address, bytes);
}

int32_t NullDevice::add_region(const Region& region) {
    regions_.push_back({region});
    return static_cast<int32_t>(regions_.size() - 1);
}

void NullDevice::move_region(int32_t region, Address address, int64_t bytes) {
    Region& moved = regions_[static_cast<size_t>(region)].region;
    moved.address = address;
    moved.bytes = bytes;
}

void NullDevice::begin_step(const Variables& variables) {
    variables_ = variables;
    is_computed_ = is_drawn_ = false;
    for (RegionState& state : regions_) state.written_end = 0;
    copied_.clear();
    last_plan_region_ = -1;
}

void NullDevice::copy_to_device(Address to, const std::byte* from, int64_t bytes) {
    if (!is_allocated(to, bytes)) throw EngineryError("null device: a copy to memory that is not allocated");
    copied_.push_back({to, bytes});
    // Nothing here reads weights, and they may be larger than the host's memory.
    const bool is_read = std::any_of(regions_.begin(), regions_.end(), [to](const RegionState& state) {
        const bool has_content = state.region.kind == OperandKind::kInput || state.region.kind == OperandKind::kPeers;
        return has_content && state.region.address == to;
    });
    if (is_read) std::memcpy(reinterpret_cast<void*>(to), from, static_cast<size_t>(bytes));
}

void NullDevice::copy_to_host(std::byte* to, Address from, int64_t bytes) {
    if (!is_allocated(from, bytes)) throw EngineryError("null device: a copy of memory that is not allocated");
    for (const RegionState& state : regions_) {
        const auto end = static_cast<int64_t>(from - state.region.address) + bytes;
        if (state.region.kind != OperandKind::kBuffer || from != state.region.address || end > state.region.bytes) {
            continue;
        }
        if (end > state.written_end) {
            throw EngineryError("null device: " + in_bytes(end) + " of '" + state.region.name +
                                "' are read, of which the step has written " + std::to_string(state.written_end));
        }
        const std::vector<BufferSpec>& buffers = spec_.ranks.front().buffers;
        const auto found = std::find_if(buffers.begin(), buffers.end(),
                                        [&](const BufferSpec& buffer) { return buffer.name == state.region.name; });
        run_model();
        return copy_content(to, static_cast<int32_t>(found - buffers.begin()), bytes);
    }
    throw EngineryError("null device: a copy to the host of what is neither logits nor drawn");
}

void NullDevice::copy_content(std::byte* to, int32_t buffer, int64_t bytes) {
    const RankSpec& rank = spec_.ranks.front();
    if (buffer == rank.logits_buffer) {
        const int64_t rows = bytes / (rank.logits_stride * static_cast<int64_t>(sizeof(float)));
        for (int32_t row = 0; row < rows; ++row) {
            std::copy_n(model_->logits(row), spec_.vocab_size, reinterpret_cast<float*>(to) + row * rank.logits_stride);
        }
        return;
    }
    if (!is_drawn_) draws_.draw(spec_, variables_, inputs(), num_rows_, *model_);
    is_drawn_ = true;
    const std::vector<std::byte> content = draws_.content(rank.draws, buffer);
    if (content.empty() || static_cast<int64_t>(content.size()) < bytes) {
        throw EngineryError("null device: a copy to the host of what is neither logits nor drawn");
    }
    std::copy_n(content.begin(), bytes, to);
}

// Memory is zero when it is allocated, and nothing here computes.
void NullDevice::fill_zero(Address at, int64_t bytes) {
    if (!is_allocated(at, bytes)) throw EngineryError("null device: zeros into memory that is not allocated");
}

// A step of which nobody wants logits leaves state behind all the same.
void NullDevice::synchronize() { run_model(); }

int32_t NullDevice::load_kernel(const KernelSpec& kernel) {
    if (!kernel.cubin.empty()) check_cubin(kernel.cubin, "The machine code of kernel " + kernel.name);
    if (kernel.shared_bytes > spec_.cuda.shared_bytes) {
        throw EngineFormatError("Kernel " + kernel.name + " wants " + in_bytes(kernel.shared_bytes) +
                                " of shared memory; sm" + std::to_string(spec_.cuda.arch) + " has " +
                                std::to_string(spec_.cuda.shared_bytes) + ". Build the engine again.");
    }
    kernels_.push_back(&kernel);
    return static_cast<int32_t>(kernels_.size() - 1);
}

void NullDevice::launch(const DeviceLaunch& launch) {
    if (capturing_) {
        graphs_.back().push_back(launch);
    } else {
        check_launch(launch);
    }
}

void NullDevice::begin_capture() {
    if (capturing_) throw EngineryError("null device: a capture within a capture");
    capturing_ = true;
    graphs_.emplace_back();
}

int32_t NullDevice::end_capture() {
    if (!capturing_) throw EngineryError("null device: the end of a capture that nobody began");
    capturing_ = false;
    return static_cast<int32_t>(graphs_.size() - 1);
}

void NullDevice::abandon_capture() {
    capturing_ = false;
    graphs_.pop_back();
}

void NullDevice::replay(int32_t graph) {
    if (capturing_) throw EngineryError("null device: a replay within a capture");
    for (const DeviceLaunch& launch : graphs_.at(static_cast<size_t>(graph))) check_launch(launch);
}

void NullDevice::check_launch(const DeviceLaunch& launch) {
    if (launch.kernel < 0 || static_cast<size_t>(launch.kernel) >= kernels_.size()) {
        refuse(launch, "kernel " + std::to_string(launch.kernel) + " is not loaded");
    }
    if (launch.spec->region <= last_plan_region_) {
        refuse(launch, "it has no order to the one before it: region " + std::to_string(launch.spec->region) +
                           " comes after region " + std::to_string(last_plan_region_));
    }
    last_plan_region_ = launch.spec->region;
    check_grid(launch);
    const KernelSpec& kernel = *kernels_[static_cast<size_t>(launch.kernel)];
    if (launch.arguments.size() != kernel.parameters.size()) {
        refuse(launch, std::to_string(launch.arguments.size()) + " arguments are given; it takes " +
                           std::to_string(kernel.parameters.size()));
    }
    for (size_t index = 0; index < launch.arguments.size(); ++index) {
        const ParameterKind given = launch.spec->arguments[index].parameter;
        if (given != kernel.parameters[index]) {
            refuse(launch, index,
                   std::string("is ") + name_of(given) + "; the kernel takes " + name_of(kernel.parameters[index]));
        }
        if (given == ParameterKind::kPointer) {
            if (launch.spec->arguments[index].kind == OperandKind::kPeers) {
                check_peers(launch, index);
                continue;
            }
            check_pointer(launch, index);
            if (launch.spec->arguments[index].access == Access::kRead) check_is_written(launch, index);
        } else {
            check_number(launch, index);
        }
    }
    for (size_t index = 0; index < launch.arguments.size(); ++index) {
        const ArgumentSpec& spec = launch.spec->arguments[index];
        // What other ranks write is theirs to check.
        if (spec.parameter != ParameterKind::kPointer || spec.kind == OperandKind::kPeers) continue;
        if (spec.access != Access::kRead) write(launch.arguments[index]);
    }
}

void NullDevice::check_grid(const DeviceLaunch& launch) const {
    for (size_t axis = 0; axis < launch.grid.size(); ++axis) {
        if (launch.grid[axis] >= 1 && launch.grid[axis] <= kLargestGrid[axis]) continue;
        refuse(launch, "axis " + std::to_string(axis) + " of its grid is " + std::to_string(launch.grid[axis]) +
                           "; wanted 1 to " + std::to_string(kLargestGrid[axis]));
    }
}

void NullDevice::check_pointer(const DeviceLaunch& launch, size_t index) const {
    const LaunchArgument& argument = launch.arguments[index];
    if (argument.region < 0 || static_cast<size_t>(argument.region) >= regions_.size()) {
        refuse(launch, index, "points at nothing that the plan names");
    }
    const Region& region = regions_[static_cast<size_t>(argument.region)].region;
    if (region.kind == OperandKind::kInput && argument.bits != region.address) {
        refuse(launch, index, "a graph reads '" + region.name + "' where an earlier step had it");
    }
    const ArgumentSpec& spec = launch.spec->arguments[index];
    const bool writes = spec.access != Access::kRead;
    if (region.kind != spec.kind || (spec.kind != OperandKind::kInput && region.name != spec.target)) {
        refuse(launch, index, "points into '" + region.name + "', not '" + spec.target + "'");
    }
    if (writes && (region.kind == OperandKind::kInput || region.kind == OperandKind::kWeight)) {
        refuse(launch, index, "writes '" + region.name + "', which launches only read");
    }
    if (argument.bits % kPointerAlignment != 0) {
        refuse(launch, index, "its address is not a multiple of " + std::to_string(kPointerAlignment));
    }
    if (argument.extent < 1) refuse(launch, index, "reaches over " + in_bytes(argument.extent));
    if (!Range{region.address, region.bytes}.contains(argument.bits, argument.extent)) {
        refuse(launch, index,
               in_bytes(argument.extent) + " reach outside of '" + region.name + "', which has " +
                   std::to_string(region.bytes));
    }
    if (!is_allocated(argument.bits, argument.extent))
        refuse(launch, index, "reaches into memory that is not allocated");
}

void NullDevice::check_number(const DeviceLaunch& launch, size_t index) const {
    const uint64_t bits = launch.arguments[index].bits;
    if (launch.spec->arguments[index].parameter == ParameterKind::kI32) {
        if (bits > INT32_MAX) refuse(launch, index, "is larger than an i32");
        return;
    }
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isfinite(value)) refuse(launch, index, "is not finite");
}

// What a launch reads, this step has brought: inputs by a copy, buffers under their own name, state too.
void NullDevice::check_is_written(const DeviceLaunch& launch, size_t index) const {
    const LaunchArgument& argument = launch.arguments[index];
    const RegionState& state = regions_[static_cast<size_t>(argument.region)];
    const Region& region = state.region;
    if (region.kind == OperandKind::kInput) {
        const bool copied = std::any_of(copied_.begin(), copied_.end(), [&](const Range& range) {
            return range.contains(argument.bits, argument.extent);
        });
        if (!copied) refuse(launch, index, "reads input '" + region.name + "', which was not copied in this step");
    }
    if (region.kind == OperandKind::kState && state.written_end == 0) {
        refuse(launch, index, "reads state of '" + region.name + "', to which this step has added nothing");
    }
    if (region.kind != OperandKind::kBuffer || region.keeps) return;
    const auto end = static_cast<int64_t>(argument.bits - region.address) + argument.extent;
    if (end <= state.written_end) return;
    refuse(launch, index,
           state.written_end == 0
               ? "reads '" + region.name + "', which is not written in this step, or whose bytes others have since"
               : "reads " + in_bytes(end) + " of '" + region.name + "', of which " + std::to_string(state.written_end) +
                     " are written");
}

void NullDevice::write(const LaunchArgument& argument) {
    RegionState& written = regions_[static_cast<size_t>(argument.region)];
    const Address begin = argument.bits, end = begin + static_cast<Address>(argument.extent);
    for (RegionState& other : regions_) {
        const Region& region = other.region;
        const bool overlaps = region.address < end && begin < region.address + static_cast<Address>(region.bytes);
        if (&other != &written && region.kind == OperandKind::kBuffer && overlaps) other.written_end = 0;
    }
    written.written_end = std::max(written.written_end, static_cast<int64_t>(end - written.region.address));
}

void NullDevice::refuse(const DeviceLaunch& launch, const std::string& what) const {
    const auto kernel = static_cast<size_t>(launch.spec->kernel);
    const bool known = launch.spec->kernel >= 0 && kernel < spec_.cuda.kernels.size();
    throw EngineryError("null device: launch of " + (known ? spec_.cuda.kernels[kernel].name : "no kernel") +
                        " in region " + std::to_string(launch.spec->region) + ": " + what);
}

void NullDevice::refuse(const DeviceLaunch& launch, size_t argument, const std::string& what) const {
    refuse(launch, "argument " + launch.spec->arguments[argument].name + ": " + what);
}

const NullDevice::RegionState& NullDevice::input(const char* name, int32_t group) const {
    const auto found = std::find_if(regions_.begin(), regions_.end(), [&](const RegionState& state) {
        return state.region.kind == OperandKind::kInput && state.region.name == name && state.region.group == group;
    });
    if (found == regions_.end()) throw EngineryError(std::string("null device: no input ") + name);
    return *found;
}

NullStep::Find NullDevice::inputs() const {
    return [this](const char* name, int32_t group) {
        const Region& region = input(name, group).region;
        return std::pair(reinterpret_cast<const std::byte*>(region.address), region.bytes);
    };
}

void NullDevice::run_model() {
    if (is_computed_ || model_ == nullptr) return;
    is_computed_ = true;
    const NullStep step(spec_, variables_, inputs(), draws_.tokens());
    num_rows_ = step.step().num_rows;
    model_->launch(step.step());
    model_->collect();
}

std::unique_ptr<CudaDevice> make_null_device(const ExecutorSpec& spec, size_t rank) {
    return std::make_unique<NullDevice>(spec, rank);
}

}  // namespace enginery
