#include "poison.h"

#include <cstring>

#include "cpu_executor.h"

namespace enginery {

namespace {

void fill(std::byte* data, int64_t bytes, std::byte pattern) {
    if (bytes > 0) std::memset(data, static_cast<int>(pattern), static_cast<size_t>(bytes));
}

}  // namespace

void CpuExecutor::poison(const Step& step) {
    // 0xff.. is NaN in every float type; 0x7f.. is the largest number of most, and outlives a maximum, as NaN does not.
    poison_ ^= std::byte{0x80};
    for (Rank& rank : ranks_) {
        fill(rank.arena.data(), rank.arena.bytes(), poison_);
        fill(rank.thread_buffers.data(), rank.thread_buffers.bytes(), poison_);
        fill(rank.scratch.data(), rank.scratch.bytes(), poison_);
        for (size_t group = 0; group < rank.state.size(); ++group) poison_new_blocks(step, rank, group);
    }
}

// Blocks that begin with a token of this step: what they hold was some other sequence's. Where the first token lies in
// the middle of a block, the rest of that block was poisoned when it was new.
void CpuExecutor::poison_new_blocks(const Step& step, const Rank& rank, size_t group) const {
    const auto [block_table, max_blocks, slots] = step.groups[group];
    const int32_t block_size = spec_.groups[group].block_size;
    const int64_t block_bytes = spec_.groups[group].block_bytes;
    for (int32_t sequence = 0; sequence < step.num_sequences; ++sequence) {
        const int32_t first_position = step.positions[step.query_start[sequence]];
        for (int32_t i = (first_position + block_size - 1) / block_size; i < max_blocks; ++i) {
            const int64_t block = block_table[int64_t{sequence} * max_blocks + i];
            if (block >= 0) fill(rank.state[group].data() + block * block_bytes, block_bytes, poison_);
        }
    }
}

}  // namespace enginery
