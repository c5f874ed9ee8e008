#include "block_manager.h"

#include <algorithm>
#include <limits>

#include "errors.h"

namespace enginery {
namespace {

Digest root_digest(const std::string& cache_salt, int32_t rope_key) {
    Sha256 hash;
    hash.update(&rope_key, sizeof(rope_key));
    hash.update(cache_salt.data(), cache_salt.size());
    return hash.finish();
}

Digest chain_digest(const Digest& parent, const int32_t* token_ids, int32_t num_tokens) {
    Sha256 hash;
    hash.update(parent.data(), parent.size());
    hash.update(token_ids, static_cast<size_t>(num_tokens) * sizeof(int32_t));
    return hash.finish();
}

}  // namespace

BlockManager::BlockManager(const std::vector<StateGroupSpec>& groups, const std::vector<int32_t>& num_blocks,
                           const PrefixSettings& prefix)
    : prefix_(prefix) {
    if (groups.empty() || groups.size() != num_blocks.size()) {
        throw EngineFormatError("the engine has " + std::to_string(groups.size()) + " state groups and " +
                                std::to_string(num_blocks.size()) + " block counts; wanted one count for each of at " +
                                "least one group");
    }
    for (size_t g = 0; g < groups.size(); ++g) {
        const StateGroupSpec& spec = groups[g];
        const bool is_window = spec.kind == "window";
        if ((!is_window && spec.kind != "full") || is_window != (spec.window > 0)) {
            throw EngineFormatError("state group '" + spec.name + "' is of kind '" + spec.kind + "' with window " +
                                    std::to_string(spec.window) + "; wanted 'full' with 0 or 'window' with 1 or more");
        }
        if (spec.block_size < 1 || (g > 0 && spec.block_size != block_size_)) {
            throw EngineFormatError("state group '" + spec.name + "' has blocks of " + std::to_string(spec.block_size) +
                                    " tokens; wanted the same positive size in every group");
        }
        if (num_blocks[g] < 1) {
            throw CapacityError("state group '" + spec.name + "' has " + std::to_string(num_blocks[g]) +
                                " blocks; give the KV cache more memory");
        }
        block_size_ = spec.block_size;
        groups_.push_back({spec.name, spec.window, BlockPool(num_blocks[g])});
    }
}

// The most blocks that a sequence holds at once while it grows to `length`, in chunks of at most max_chunk: a window's
// past and the chunk, which need not begin with a block.
int32_t BlockManager::peak_blocks(const Group& group, int32_t length, int32_t max_chunk) const {
    const int32_t all = blocks_of(length);
    if (group.window == 0) return all;
    const int64_t span = int64_t{group.window} - 1 + max_chunk;
    const int64_t touched = (span + block_size_ - 2) / block_size_ + 1;
    return static_cast<int32_t>(std::min<int64_t>({all, touched, group.pool.num_blocks()}));
}

int64_t BlockManager::capacity_tokens() const {
    int64_t capacity = std::numeric_limits<int64_t>::max();
    for (const Group& group : groups_) {
        const int64_t span = group.window;  // of one token and what it sees
        const bool unlimited =
            group.window > 0 && (span + block_size_ - 2) / block_size_ + 1 <= group.pool.num_blocks();
        if (!unlimited) capacity = std::min(capacity, int64_t{group.pool.num_blocks()} * block_size_);
    }
    return capacity;
}

void BlockManager::extend_hashes(Sequence& sequence, int32_t num_blocks) const {
    auto& hashes = sequence.block_hashes;
    while (static_cast<int32_t>(hashes.size()) < num_blocks) {
        const Digest parent =
            hashes.empty() ? root_digest(sequence.request.cache_salt, prefix_.rope_key(sequence.num_prompt_tokens))
                           : hashes.back();
        const int32_t* tokens = sequence.token_ids.data() + hashes.size() * static_cast<size_t>(block_size_);
        hashes.push_back(chain_digest(parent, tokens, block_size_));
    }
}

int32_t BlockManager::find_prefix(Sequence& sequence) {
    if (!prefix_.enabled) return 0;
    int32_t hit = (sequence.num_known_tokens() - 1) / block_size_;
    extend_hashes(sequence, hit);
    // From the longest candidate down: a block that a group lacks rules out every prefix whose next token would see it.
    for (bool settled = false; !settled && hit > 0;) {
        settled = true;
        for (const Group& group : groups_) {
            if (group.window == 0) {
                int32_t present = 0;
                while (present < hit && group.pool.find(sequence.block_hashes[static_cast<size_t>(present)]) >= 0) {
                    ++present;
                }
                settled = settled && present == hit;
                hit = present;
                continue;
            }
            for (int32_t block = hit - 1; block >= 0 && block >= group.first_seen(hit * block_size_) / block_size_;
                 --block) {
                if (group.pool.find(sequence.block_hashes[static_cast<size_t>(block)]) >= 0) continue;
                hit = block;
                settled = false;
            }
        }
    }
    return hit * block_size_;
}

bool BlockManager::can_admit(const std::vector<Sequence*>& running, const std::vector<int32_t>& lengths,
                             const Sequence& candidate, int32_t candidate_length, int32_t num_cached_tokens,
                             int32_t max_chunk) const {
    const auto num_hits = static_cast<size_t>(num_cached_tokens / block_size_);
    for (size_t g = 0; g < groups_.size(); ++g) {
        const Group& group = groups_[g];
        int64_t wanted = 0;
        if (group.window > 0) {
            // Blocks come and go here, and one that two sequences share is freed only by the last: so each one's peak
            // is set aside in full.
            for (size_t i = 0; i < running.size(); ++i) {
                const int32_t chunk = running[i]->num_pending_tokens() > 1 ? max_chunk : 1;
                wanted += peak_blocks(group, lengths[i], chunk);
            }
            wanted += peak_blocks(group, candidate_length, max_chunk);
            if (wanted > group.pool.num_blocks()) return false;
            continue;
        }
        for (size_t i = 0; i < running.size(); ++i) {
            const auto held = static_cast<int32_t>(running[i]->block_tables[g].size());
            wanted += std::max(0, blocks_of(lengths[i]) - held);
        }
        wanted += blocks_of(candidate_length) - static_cast<int64_t>(num_hits);
        for (size_t block = 0; block < num_hits; ++block) {
            wanted += !group.pool.is_referenced(group.pool.find(candidate.block_hashes[block]));
        }
        if (wanted > group.pool.num_free()) return false;
    }
    return true;
}

void BlockManager::share_prefix(Sequence& sequence, int32_t num_cached_tokens) {
    const int32_t num_hits = num_cached_tokens / block_size_;
    for (size_t g = 0; g < groups_.size(); ++g) {
        Group& group = groups_[g];
        auto& table = sequence.block_tables[g];
        const int32_t first = group.first_seen(num_cached_tokens) / block_size_;
        for (int32_t block = 0; block < num_hits; ++block) {
            table.push_back(block < first ? -1 : group.pool.find(sequence.block_hashes[static_cast<size_t>(block)]));
            if (table.back() >= 0) group.pool.acquire(table.back());
        }
    }
    sequence.num_computed_tokens = num_cached_tokens;
    sequence.num_published_blocks = num_hits;
}

int32_t BlockManager::allocatable_tokens(const Sequence& sequence) const {
    int64_t num_tokens = std::numeric_limits<int32_t>::max();
    for (size_t g = 0; g < groups_.size(); ++g) {
        const int64_t num_blocks = static_cast<int64_t>(sequence.block_tables[g].size()) + groups_[g].pool.num_free();
        num_tokens = std::min(num_tokens, num_blocks * block_size_ - sequence.num_computed_tokens);
    }
    return static_cast<int32_t>(num_tokens);
}

void BlockManager::allocate(Sequence& sequence, int32_t num_tokens) {
    const auto num_blocks = static_cast<size_t>(blocks_of(sequence.num_computed_tokens + num_tokens));
    for (size_t g = 0; g < groups_.size(); ++g) {
        auto& table = sequence.block_tables[g];
        while (table.size() < num_blocks) table.push_back(groups_[g].pool.allocate());
    }
}

void BlockManager::advance(Sequence& sequence) {
    const int32_t num_full = sequence.num_computed_tokens / block_size_;
    if (prefix_.enabled && sequence.num_published_blocks < num_full) {
        extend_hashes(sequence, num_full);
        for (; sequence.num_published_blocks < num_full; ++sequence.num_published_blocks) {
            const auto block = static_cast<size_t>(sequence.num_published_blocks);
            for (size_t g = 0; g < groups_.size(); ++g) {
                const int32_t id = sequence.block_tables[g][block];
                if (id >= 0) groups_[g].pool.publish(id, sequence.block_hashes[block]);
            }
        }
    }
    for (size_t g = 0; g < groups_.size(); ++g) {
        if (groups_[g].window == 0) continue;
        auto& table = sequence.block_tables[g];
        const int32_t first = groups_[g].first_seen(sequence.num_computed_tokens) / block_size_;
        for (int32_t block = first - 1; block >= 0 && table[static_cast<size_t>(block)] >= 0; --block) {
            groups_[g].pool.release(table[static_cast<size_t>(block)]);
            table[static_cast<size_t>(block)] = -1;
        }
    }
}

void BlockManager::free(Sequence& sequence) {
    for (size_t g = 0; g < groups_.size(); ++g) {
        auto& table = sequence.block_tables[g];
        // From the end, so that the beginning, which more prompts share, is evicted last.
        for (auto block = table.rbegin(); block != table.rend(); ++block) {
            if (*block >= 0) groups_[g].pool.release(*block);
        }
        table.clear();
    }
    sequence.num_computed_tokens = 0;
    sequence.num_published_blocks = 0;
}

void BlockManager::forget(const Sequence& sequence) {
    for (size_t g = 0; g < groups_.size(); ++g) {
        for (const int32_t block : sequence.block_tables[g]) {
            if (block >= 0) groups_[g].pool.forget(block);
        }
    }
}

void BlockManager::check_idle() const {
    for (const Group& group : groups_) group.pool.check_idle(group.name);
}

}  // namespace enginery
