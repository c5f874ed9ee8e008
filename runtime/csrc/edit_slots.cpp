#include "edit_slots.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace enginery {
namespace {

// Whether stop tokens are masked when the next token is drawn.
bool is_masked(const Sequence& sequence) {
    const Request& request = sequence.request;
    return sequence.num_generated_tokens() < request.min_tokens && !request.stop_token_ids.empty();
}

bool has_edits(const Sequence& sequence) {
    return sequence.request.has_penalties() || !sequence.request.logit_bias.empty() || is_masked(sequence);
}

// Of all tokens, or of those that were masked.
std::map<int32_t, Edit> edits_of(const Sequence& sequence) {
    const Request& request = sequence.request;
    std::map<int32_t, Edit> edits;
    for (const auto& [token, num_generated] : sequence.token_counts) edits[token].count = 1 + num_generated;
    for (const auto& [token, bias] : request.logit_bias) edits[token].bias += bias;
    if (!is_masked(sequence)) return edits;
    for (const int32_t token : request.stop_token_ids) edits[token].bias = -INFINITY;
    return edits;
}

}  // namespace

EditSlots::EditSlots(const DrawLimits& limits) : limits_(limits) {
    for (int32_t slot = limits.edit_slots; slot-- > 0;) free_.push_back(slot);
}

bool EditSlots::reserve(Sequence& sequence) {
    if (sequence.request.logprobs > limits_.max_logprobs) return false;
    if (!has_edits(sequence)) {
        release(sequence);
        return true;
    }
    if (sequence.edit_slot < 0) {
        if (free_.empty()) return false;
        sequence.edit_slot = free_.back();
        free_.pop_back();
        sequence.edits_told = false;
    }
    const Request& request = sequence.request;
    if (!sequence.edits_told || sequence.edits_masked) {
        num_planned_ += static_cast<int64_t>(request.stop_token_ids.size());
    }
    if (!sequence.edits_told) {
        num_planned_ += 1 + static_cast<int64_t>(sequence.token_counts.size() + request.logit_bias.size());
    }
    return num_planned_ <= limits_.max_edits;
}

Draw EditSlots::prepare(Sequence& sequence, std::vector<Edit>& edits) const {
    const Request& request = sequence.request;
    const Draw draw{request.temperature,
                    request.top_k,
                    request.top_p,
                    request.min_p,
                    sequence.seed,
                    sequence.num_generated_tokens(),
                    request.logprobs,
                    sequence.edit_slot,
                    request.presence_penalty,
                    request.frequency_penalty,
                    request.repetition_penalty};
    if (sequence.edit_slot < 0) return draw;
    const bool masked = is_masked(sequence);
    const bool unmasks = sequence.edits_told && sequence.edits_masked && !masked;
    if (!sequence.edits_told) edits.push_back({sequence.edit_slot});
    if (!sequence.edits_told || unmasks) {
        const auto& stops = request.stop_token_ids;
        std::map<int32_t, Edit> wanted = edits_of(sequence);
        for (const int32_t token : stops) wanted.try_emplace(token);
        for (auto& [token, edit] : wanted) {
            if (token >= limits_.vocab_size) continue;
            if (unmasks && std::find(stops.begin(), stops.end(), token) == stops.end()) continue;
            edits.push_back({sequence.edit_slot, token, edit.count, edit.bias});
        }
    }
    sequence.edits_told = true;
    sequence.edits_masked = masked;
    return draw;
}

void EditSlots::release(Sequence& sequence) {
    if (sequence.edit_slot >= 0) free_.push_back(sequence.edit_slot);
    sequence.edit_slot = -1;
    sequence.edits_told = sequence.edits_masked = false;
}

}  // namespace enginery
