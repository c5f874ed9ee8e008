// What the null device checks of launches that touch other ranks' memory.
#include <algorithm>

#include "errors.h"
#include "null_device.h"

namespace enginery {

void NullDevice::connect(const std::vector<CudaDevice*>& ranks) {
    for (const CudaDevice* device : ranks) ranks_.push_back(dynamic_cast<const NullDevice*>(device));
}

// The table names the buffer of every rank, which this rank's part of a step has written by now.
void NullDevice::check_peers(const DeviceLaunch& launch, size_t index) const {
    const LaunchArgument& argument = launch.arguments[index];
    const ArgumentSpec& spec = launch.spec->arguments[index];
    const bool is_region = argument.region >= 0 && static_cast<size_t>(argument.region) < regions_.size();
    const Region table = is_region ? regions_[static_cast<size_t>(argument.region)].region : Region{};
    const auto bytes = static_cast<int64_t>(ranks_.size() * sizeof(Address));
    if (table.kind != OperandKind::kPeers || table.name != spec.target || argument.bits != table.address ||
        table.bytes != bytes || !is_allocated(argument.bits, bytes) || argument.bits % kPointerAlignment != 0) {
        refuse(launch, index, "points to no table of '" + spec.target + "'");
    }
    if (argument.extent < 1) refuse(launch, index, "reaches over " + std::to_string(argument.extent) + " bytes");
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
        const RegionState* state = ranks_[rank]->buffer(spec.target);
        const Address address = reinterpret_cast<const Address*>(argument.bits)[rank];
        const auto of_rank = "of rank " + std::to_string(rank) + " ";
        if (state == nullptr || address != state->region.address + static_cast<Address>(spec.offset) ||
            address % kPointerAlignment != 0) {
            refuse(launch, index, of_rank + "points elsewhere than to '" + spec.target + "'");
        }
        if (!Range{state->region.address, state->region.bytes}.contains(address, argument.extent) ||
            !ranks_[rank]->is_allocated(address, argument.extent)) {
            refuse(launch, index, of_rank + "reaches outside of '" + spec.target + "'");
        }
        if (spec.access != Access::kRead && !state->region.keeps) {
            refuse(launch, index, of_rank + "writes '" + spec.target + "', which that rank may be using");
        }
    }
    // Some ranks have less to show than others.
    const RegionState* own = buffer(spec.target);
    if (spec.access == Access::kRead && !own->region.keeps && own->written_end <= spec.offset) {
        refuse(launch, index, "reads '" + spec.target + "', which is not written in this step");
    }
}

const NullDevice::RegionState* NullDevice::buffer(const std::string& name) const {
    const auto found = std::find_if(regions_.begin(), regions_.end(), [&](const RegionState& state) {
        return state.region.kind == OperandKind::kBuffer && state.region.name == name;
    });
    return found == regions_.end() ? nullptr : &*found;
}

}  // namespace enginery
