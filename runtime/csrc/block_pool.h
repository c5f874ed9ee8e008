// The blocks of one state group: who holds them, which are free, and which can be found again by what they hold.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "sha256.h"

namespace enginery {

// A block is referenced by sequences, or in the free list. One that holds a published prefix stays findable there until
// it is handed out again; blocks without one go first, then the least recently used.
class BlockPool {
  public:
    explicit BlockPool(int32_t num_blocks);

    int32_t num_blocks() const { return num_blocks_; }
    int32_t num_free() const { return num_free_; }  // those in the prefix cache that nobody references included
    int32_t num_cached() const { return static_cast<int32_t>(cached_.size()); }
    bool is_referenced(int32_t block) const { return references_[static_cast<size_t>(block)] > 0; }

    int32_t allocate();                        // a free block, now referenced once; there must be one
    void acquire(int32_t block);               // one more reference
    void release(int32_t block);               // one less; without any left it is free
    int32_t find(const Digest& digest) const;  // the block published under it, or -1

    // Makes a referenced block findable, unless another already holds the same tokens.
    void publish(int32_t block, const Digest& digest);
    void forget(int32_t block);  // no longer findable

    // Throws EngineryError, naming the group, unless every block is free and the books agree.
    void check_idle(const std::string& group) const;

  private:
    void unlink(int32_t block);
    void link_before(int32_t block, int32_t successor);

    int32_t num_blocks_;
    int32_t num_free_ = 0;
    std::vector<int32_t> references_;
    // The free list, a ring through the element num_blocks_: its successor is handed out next.
    std::vector<int32_t> next_;
    std::vector<int32_t> previous_;
    std::vector<const Digest*> digests_;  // [block], the key in cached_, or null
    std::unordered_map<Digest, int32_t, DigestHash> cached_;
};

}  // namespace enginery
