// Tables of where buffers lie on every rank, for launches that touch other ranks' memory: each i64 [world_size], in
// order of ranks, in the memory of the rank that launches.
#pragma once

#include <functional>
#include <vector>

#include "cuda_device.h"

namespace enginery {

class PeerTables {
  public:
    // The address of byte `offset` of the buffer, wherever it lies on every rank.
    struct Table {
        int32_t buffer = 0;  // of the rank that launches
        int64_t offset = 0;
        Address address = 0;
        int32_t region = 0;
    };

    // Allocates those that the launches of `rank` name. Throws EngineFormatError for one of no buffer.
    void allocate(CudaDevice& device, const RankSpec& rank, size_t world_size);

    const Table& find(int32_t buffer, int64_t offset) const;

    // Writes them. address_of: of a buffer like this one on another rank.
    void fill(CudaDevice& device, const RankSpec& rank,
              const std::function<Address(size_t rank, const BufferSpec& buffer)>& address_of) const;

  private:
    size_t world_size_ = 1;
    int64_t bytes_ = 0;
    std::vector<Table> tables_;
};

}  // namespace enginery
