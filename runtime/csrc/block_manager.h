// Where sequences keep their state: one block table per state group and sequence, blocks shared by equal prefixes.
// Knows tokens only; what a block holds is the executor's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "block_pool.h"
#include "executor.h"
#include "request.h"

namespace enginery {

struct PrefixSettings {
    bool enabled = true;
    // Rotary tables may depend on the length of the prompt (longrope, dynamic): state is shared only between prompts
    // that agree on rope_key.
    int32_t rope_threshold = 0;  // 0 = they do not
    bool rope_exact = false;     // beyond the threshold every length differs

    int32_t rope_key(int32_t prompt_length) const {
        if (rope_threshold <= 0 || prompt_length <= rope_threshold) return 0;
        return rope_exact ? prompt_length : 1;
    }
};

class BlockManager {
  public:
    // Throws EngineFormatError where groups contradict each other or themselves.
    BlockManager(const std::vector<StateGroupSpec>& groups, const std::vector<int32_t>& num_blocks,
                 const PrefixSettings& prefix);

    // The most tokens of one sequence whose state fits when it is alone.
    int64_t capacity_tokens() const;
    size_t num_groups() const { return groups_.size(); }
    const BlockPool& pool(size_t group) const { return groups_[group].pool; }
    const std::string& name(size_t group) const { return groups_[group].name; }
    int32_t block_size() const { return block_size_; }

    // How many leading tokens of a sequence that holds nothing are in the cache in every group; always leaves one.
    int32_t find_prefix(Sequence& sequence);

    // Whether a sequence that holds nothing, of which num_cached_tokens can be shared, may join the running ones, each
    // of which will come to hold the state of `length` tokens (`lengths` of the running in their order), while it is
    // computed in chunks of at most max_chunk: then none of them ever lacks a block.
    bool can_admit(const std::vector<Sequence*>& running, const std::vector<int32_t>& lengths,
                   const Sequence& candidate, int32_t candidate_length, int32_t num_cached_tokens,
                   int32_t max_chunk) const;

    // Takes the references that find_prefix found and counts their tokens as computed.
    void share_prefix(Sequence& sequence, int32_t num_cached_tokens);

    // How many tokens after the computed ones could have blocks now.
    int32_t allocatable_tokens(const Sequence& sequence) const;

    // Gives blocks to the next num_tokens tokens; at most allocatable_tokens.
    void allocate(Sequence& sequence, int32_t num_tokens);

    // After num_computed_tokens has grown: publishes blocks that became full and frees those that no later position
    // sees.
    void advance(Sequence& sequence);

    // Frees all blocks of a sequence; nothing of it is computed any more.
    void free(Sequence& sequence);

    // Takes what a sequence published out of the cache: its state is not to be trusted.
    void forget(const Sequence& sequence);

    // Throws EngineryError unless all blocks are free, as they must be when no sequence runs.
    void check_idle() const;

  private:
    struct Group {
        std::string name;
        int32_t window;  // 0 = full
        BlockPool pool;

        // The first position that a query at `position` sees.
        int32_t first_seen(int32_t position) const {
            return window == 0 || position < window ? 0 : position - window + 1;
        }
    };

    int32_t blocks_of(int32_t num_tokens) const { return (num_tokens + block_size_ - 1) / block_size_; }
    int32_t peak_blocks(const Group& group, int32_t length, int32_t max_chunk) const;
    void extend_hashes(Sequence& sequence, int32_t num_blocks) const;

    std::vector<Group> groups_;
    PrefixSettings prefix_;
    int32_t block_size_ = 0;
};

}  // namespace enginery
