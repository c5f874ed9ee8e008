#include "peer_tables.h"

#include <algorithm>

#include "errors.h"

namespace enginery {
namespace {

size_t table_bytes(size_t world_size) {
    constexpr size_t kAlignment = kPointerAlignment;
    return (world_size * sizeof(Address) + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

void PeerTables::allocate(CudaDevice& device, const RankSpec& rank, size_t world_size) {
    world_size_ = world_size;
    const auto is_there = [this](const ArgumentSpec& argument) {
        return std::any_of(tables_.begin(), tables_.end(), [&](const Table& table) {
            return table.buffer == argument.index && table.offset == argument.offset;
        });
    };
    for (const std::vector<LaunchSpec>* launches : {&rank.launches, &rank.sample}) {
        for (const LaunchSpec& launch : *launches) {
            for (const ArgumentSpec& argument : launch.arguments) {
                if (argument.parameter != ParameterKind::kPointer || argument.kind != OperandKind::kPeers) continue;
                if (argument.index < 0 || static_cast<size_t>(argument.index) >= rank.buffers.size()) {
                    throw EngineFormatError(
                        "An argument points to a buffer that is not there. The engine is damaged: "
                        "build it again.");
                }
                if (!is_there(argument)) tables_.push_back({argument.index, argument.offset, 0, 0});
            }
        }
    }
    if (tables_.empty()) return;
    const size_t size = table_bytes(world_size);
    bytes_ = static_cast<int64_t>(tables_.size() * size);
    Address address = device.allocate(bytes_, "addresses of peers");
    for (Table& table : tables_) {
        const std::string& name = rank.buffers[static_cast<size_t>(table.buffer)].name;
        const auto bytes = static_cast<int64_t>(world_size * sizeof(Address));
        table.address = address;
        table.region = device.add_region({OperandKind::kPeers, name, -1, address, bytes, true});
        address += size;
    }
}

const PeerTables::Table& PeerTables::find(int32_t buffer, int64_t offset) const {
    return *std::find_if(tables_.begin(), tables_.end(),
                         [&](const Table& table) { return table.buffer == buffer && table.offset == offset; });
}

void PeerTables::fill(CudaDevice& device, const RankSpec& rank,
                      const std::function<Address(size_t rank, const BufferSpec& buffer)>& address_of) const {
    if (tables_.empty()) return;
    std::byte* host = device.allocate_pinned(bytes_, "addresses of peers");
    const size_t entries = table_bytes(world_size_) / sizeof(Address);
    for (size_t index = 0; index < tables_.size(); ++index) {
        const BufferSpec& buffer = rank.buffers[static_cast<size_t>(tables_[index].buffer)];
        auto* table = reinterpret_cast<Address*>(host) + index * entries;
        for (size_t other = 0; other < world_size_; ++other) {
            table[other] = address_of(other, buffer) + static_cast<Address>(tables_[index].offset);
        }
    }
    device.copy_to_device(tables_.front().address, host, bytes_);
    device.synchronize();
    device.free_pinned(host);
}

}  // namespace enginery
