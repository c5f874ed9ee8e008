#include "block_pool.h"

#include "errors.h"

namespace enginery {

BlockPool::BlockPool(int32_t num_blocks)
    : num_blocks_(num_blocks),
      references_(static_cast<size_t>(num_blocks), 0),
      next_(static_cast<size_t>(num_blocks) + 1, num_blocks),
      previous_(static_cast<size_t>(num_blocks) + 1, num_blocks),
      digests_(static_cast<size_t>(num_blocks), nullptr) {
    cached_.reserve(static_cast<size_t>(num_blocks));
    for (int32_t block = 0; block < num_blocks; ++block) link_before(block, num_blocks_);
}

void BlockPool::unlink(int32_t block) {
    const auto b = static_cast<size_t>(block);
    next_[static_cast<size_t>(previous_[b])] = next_[b];
    previous_[static_cast<size_t>(next_[b])] = previous_[b];
    --num_free_;
}

void BlockPool::link_before(int32_t block, int32_t successor) {
    const auto b = static_cast<size_t>(block);
    const auto s = static_cast<size_t>(successor);
    next_[b] = successor;
    previous_[b] = previous_[s];
    next_[static_cast<size_t>(previous_[s])] = block;
    previous_[s] = block;
    ++num_free_;
}

int32_t BlockPool::allocate() {
    const int32_t block = next_[static_cast<size_t>(num_blocks_)];
    if (block == num_blocks_) throw EngineryError("internal error: a block was allocated where none is free");
    unlink(block);
    forget(block);
    references_[static_cast<size_t>(block)] = 1;
    return block;
}

void BlockPool::acquire(int32_t block) {
    if (references_[static_cast<size_t>(block)]++ == 0) unlink(block);
}

void BlockPool::release(int32_t block) {
    const auto b = static_cast<size_t>(block);
    if (references_[b] <= 0) throw EngineryError("internal error: block " + std::to_string(block) + " was freed twice");
    if (--references_[b] > 0) return;
    const int32_t first = next_[static_cast<size_t>(num_blocks_)];
    link_before(block, digests_[b] == nullptr ? first : num_blocks_);
}

int32_t BlockPool::find(const Digest& digest) const {
    const auto found = cached_.find(digest);
    return found == cached_.end() ? -1 : found->second;
}

void BlockPool::publish(int32_t block, const Digest& digest) {
    auto& known = digests_[static_cast<size_t>(block)];
    if (known != nullptr) return;
    const auto [entry, inserted] = cached_.try_emplace(digest, block);
    if (inserted) known = &entry->first;  // stable: unordered_map never moves its elements
}

void BlockPool::forget(int32_t block) {
    auto& known = digests_[static_cast<size_t>(block)];
    if (known == nullptr) return;
    cached_.erase(cached_.find(*known));
    known = nullptr;
}

void BlockPool::check_idle(const std::string& group) const {
    int32_t num_linked = 0;
    for (int32_t block = next_[static_cast<size_t>(num_blocks_)]; block != num_blocks_ && num_linked <= num_blocks_;
         block = next_[static_cast<size_t>(block)]) {
        ++num_linked;
    }
    int32_t num_referenced = 0;
    size_t num_named = 0;
    for (size_t block = 0; block < references_.size(); ++block) {
        num_referenced += references_[block] != 0;
        num_named += digests_[block] != nullptr;
    }
    if (num_referenced == 0 && num_linked == num_blocks_ && num_free_ == num_blocks_ && num_named == cached_.size()) {
        return;
    }
    throw EngineryError("internal error: the loop is idle, but of the " + std::to_string(num_blocks_) +
                        " blocks of state group '" + group + "' " + std::to_string(num_referenced) +
                        " are referenced, " + std::to_string(num_linked) + " listed as free, " +
                        std::to_string(num_free_) + " counted as free, and " + std::to_string(num_named) + " of " +
                        std::to_string(cached_.size()) + " cached");
}

}  // namespace enginery
