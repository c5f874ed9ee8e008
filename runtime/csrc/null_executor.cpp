// The null device: no model, but a memory that notices every mistake of the loop. Each slot keeps a hash of all that
// its token could see, read through the block tables, and the position it was written for; logits derive from that
// hash.
#include <algorithm>
#include <cmath>
#include <string>

#include "errors.h"
#include "executor.h"
#include "null_faults.h"

namespace enginery {
namespace {

uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93U;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93U;
    return z ^ (z >> 32);
}

struct Slot {
    uint64_t hash = 0;
    int32_t position = -1;
    int64_t written_in = -1;  // step
};

struct BlockWriter {
    int64_t step = -1;
    int32_t sequence = -1;  // of that step
};

struct GroupState {
    StateGroupSpec spec;
    int32_t num_blocks = 0;
    std::vector<Slot> slots;
    std::vector<BlockWriter> writers;
};

class NullExecutor final : public Executor {
  public:
    explicit NullExecutor(const ExecutorSpec& spec)
        : spec_(spec), fail_token_(fault_token(spec.isa, "fail_on")), nan_token_(fault_token(spec.isa, "nan_on")) {
        for (size_t g = 0; g < spec.groups.size(); ++g) {
            const int32_t num_blocks = spec.num_blocks[g];
            const auto num_slots = static_cast<size_t>(num_blocks) * static_cast<size_t>(spec.groups[g].block_size);
            groups_.push_back({spec.groups[g], num_blocks, std::vector<Slot>(num_slots),
                               std::vector<BlockWriter>(static_cast<size_t>(num_blocks))});
        }
        logits_.resize(static_cast<size_t>(spec.max_rows) * static_cast<size_t>(spec.vocab_size));
    }

    void launch(const Step& step) override {
        ++step_number_;
        check_shape(step);
        for (size_t g = 0; g < groups_.size(); ++g) {
            claim_blocks(step, g);
            check_sharing(step, g);
        }
        hashes_.resize(static_cast<size_t>(step.num_tokens));
        for (int32_t token = 0; token < step.num_tokens; ++token) run_token(step, token);
        for (int32_t row = 0; row < step.num_rows; ++row) write_logits(step, row);
    }

    void collect() override {}

    float* logits(int32_t row) override {
        return logits_.data() + static_cast<size_t>(row) * static_cast<size_t>(spec_.vocab_size);
    }

    void parallel_for(int32_t count, const std::function<void(int32_t)>& fn) override {
        for (int32_t i = 0; i < count; ++i) fn(i);
    }

    std::map<std::string, int64_t> memory() const override {
        int64_t state = 0;
        for (const GroupState& group : groups_) state += static_cast<int64_t>(group.slots.size() * sizeof(Slot));
        return {
            {"weights", 0}, {"activations", static_cast<int64_t>(logits_.size() * sizeof(float))}, {"state", state}};
    }

  private:
    [[noreturn]] void refuse(const std::string& what) const {
        throw EngineryError("null device, step " + std::to_string(step_number_) + ": " + what);
    }

    void check_range(const char* what, int64_t value, int64_t low, int64_t high) const {
        if (value >= low && value <= high) return;
        refuse(std::string(what) + " is " + std::to_string(value) + "; wanted " + std::to_string(low) + " to " +
               std::to_string(high));
    }

    void check_shape(const Step& step) const {
        check_range("number of tokens", step.num_tokens, 1, spec_.max_tokens);
        check_range("number of rows", step.num_rows, 0, spec_.max_rows);
        check_range("number of sequences", step.num_sequences, 1, spec_.max_sequences);
        check_range("number of groups", static_cast<int64_t>(step.groups.size()), static_cast<int64_t>(groups_.size()),
                    static_cast<int64_t>(groups_.size()));
        check_range("query_start[0]", step.query_start[0], 0, 0);
        check_range("the last query_start", step.query_start[step.num_sequences], step.num_tokens, step.num_tokens);
        for (int32_t s = 0; s < step.num_sequences; ++s) {
            const int32_t begin = step.query_start[s];
            const int32_t end = step.query_start[s + 1];
            check_range("end of a sequence's tokens", end, begin + 1, step.num_tokens);
            for (int32_t token = begin; token < end; ++token) {
                const int32_t expected = step.positions[begin] + token - begin;
                check_range("token id", step.token_ids[token], 0, spec_.vocab_size - 1);
                check_range("position", step.positions[token], std::max(0, expected), expected);
                check_range("token_sequence", step.token_sequence[token], s, s);
                check_range("prompt length", step.prompt_lengths[token], 1, INT32_MAX);
            }
        }
        for (int32_t row = 0; row < step.num_rows; ++row) {
            check_range("row", step.rows[row], row == 0 ? 0 : step.rows[row - 1] + 1, step.num_tokens - 1);
        }
    }

    // Every token is written where its sequence's table says, once, and no block by two sequences.
    void claim_blocks(const Step& step, size_t g) {
        GroupState& group = groups_[g];
        for (int32_t token = 0; token < step.num_tokens; ++token) {
            const int32_t sequence = step.token_sequence[token];
            const int64_t expected = slot_of(step, g, sequence, step.positions[token]);
            check_range("slot", step.groups[g].slots[token], expected, expected);
            Slot& slot = group.slots[static_cast<size_t>(expected)];
            if (slot.written_in == step_number_) refuse("slot " + std::to_string(expected) + " is written twice");
            slot.written_in = step_number_;
            BlockWriter& writer = group.writers[static_cast<size_t>(expected / group.spec.block_size)];
            if (writer.step == step_number_ && writer.sequence != sequence) {
                refuse("block " + std::to_string(expected / group.spec.block_size) + " of group '" + group.spec.name +
                       "' is written by sequences " + std::to_string(writer.sequence) + " and " +
                       std::to_string(sequence));
            }
            writer = {step_number_, sequence};
        }
    }

    // No sequence holds a block that another one writes.
    void check_sharing(const Step& step, size_t g) const {
        const GroupState& group = groups_[g];
        const GroupStep& tables = step.groups[g];
        for (int32_t s = 0; s < step.num_sequences; ++s) {
            for (int32_t i = 0; i < tables.max_blocks; ++i) {
                const int32_t block = tables.block_table[int64_t{s} * tables.max_blocks + i];
                check_range("block table entry", block, -1, group.num_blocks - 1);
                if (block < 0) continue;
                const BlockWriter& writer = group.writers[static_cast<size_t>(block)];
                if (writer.step != step_number_ || writer.sequence == s) continue;
                refuse("block " + std::to_string(block) + " of group '" + group.spec.name + "' is held by sequence " +
                       std::to_string(s) + " and written by sequence " + std::to_string(writer.sequence));
            }
        }
    }

    int64_t slot_of(const Step& step, size_t g, int32_t sequence, int32_t position) const {
        const GroupState& group = groups_[g];
        const GroupStep& tables = step.groups[g];
        const int32_t index = position / group.spec.block_size;
        check_range("index into the block table", index, 0, tables.max_blocks - 1);
        const int32_t block = tables.block_table[int64_t{sequence} * tables.max_blocks + index];
        if (block < 0 || block >= group.num_blocks) {
            refuse("sequence " + std::to_string(sequence) + " needs position " + std::to_string(position) +
                   " of group '" + group.spec.name + "', but block table entry " + std::to_string(index) + " is " +
                   std::to_string(block));
        }
        return int64_t{block} * group.spec.block_size + position % group.spec.block_size;
    }

    // All that the token sees in one group, in order.
    uint64_t attend(const Step& step, size_t g, int32_t sequence, int32_t position) const {
        const GroupState& group = groups_[g];
        const int32_t first = group.spec.window == 0 ? 0 : std::max(0, position - group.spec.window + 1);
        uint64_t seen = 0;
        for (int32_t key = first; key < position; ++key) {
            const int64_t index = slot_of(step, g, sequence, key);
            const Slot& slot = group.slots[static_cast<size_t>(index)];
            if (slot.position != key) {
                refuse("sequence " + std::to_string(sequence) + " reads position " + std::to_string(key) +
                       " of group '" + group.spec.name + "' from slot " + std::to_string(index) +
                       ", which was written for position " + std::to_string(slot.position));
            }
            seen += slot.hash * (2 * static_cast<uint64_t>(key) + 1);
        }
        return mix(seen);
    }

    void run_token(const Step& step, int32_t token) {
        const int32_t sequence = step.token_sequence[token];
        const int32_t position = step.positions[token];
        if (step.token_ids[token] == fail_token_) refuse("token " + std::to_string(fail_token_) + " fails on request");
        uint64_t hash = mix(static_cast<uint64_t>(step.token_ids[token]) << 32 | static_cast<uint32_t>(position));
        for (size_t g = 0; g < groups_.size(); ++g) hash = mix(hash + attend(step, g, sequence, position));
        for (size_t g = 0; g < groups_.size(); ++g) {
            Slot& slot = groups_[g].slots[static_cast<size_t>(step.groups[g].slots[token])];
            slot.hash = mix(hash + g + 1);
            slot.position = position;
        }
        hashes_[static_cast<size_t>(token)] = hash;
    }

    void write_logits(const Step& step, int32_t row) {
        const auto token = static_cast<size_t>(step.rows[row]);
        float* out = logits(row);
        for (int32_t id = 0; id < spec_.vocab_size; ++id) {
            const uint64_t noise = mix(hashes_[token] + static_cast<uint64_t>(id));
            out[id] = static_cast<float>(noise >> 40) * 0x1p-21F - 4.0F;  // 24 bits: -4 to 4
        }
        if (step.token_ids[token] == nan_token_) out[0] = NAN;
    }

    ExecutorSpec spec_;
    int32_t fail_token_;
    int32_t nan_token_;
    std::vector<GroupState> groups_;
    std::vector<uint64_t> hashes_;  // of the step's tokens
    std::vector<float> logits_;
    int64_t step_number_ = 0;
};

}  // namespace

std::unique_ptr<Executor> make_null_executor(const ExecutorSpec& spec) { return std::make_unique<NullExecutor>(spec); }

}  // namespace enginery
