#include "from_python.h"

#include <algorithm>

#include "cuda_from_python.h"

namespace enginery {
namespace {

OperandSpec read_operand(Fields& fields) {
    OperandSpec operand;
    std::string kind;
    fields.required("kind", kind);
    const std::array<const char*, 4> kinds = {"buffer", "weight", "input", "state"};
    const auto found = std::find(kinds.begin(), kinds.end(), kind);
    if (found == kinds.end()) {
        throw fields.wrong("'kind' is '" + kind + "', wanted 'buffer', 'weight', 'input' or 'state'");
    }
    operand.kind = static_cast<OperandKind>(found - kinds.begin());
    fields.optional("index", operand.index);
    fields.optional("name", operand.name);
    fields.optional("layout", operand.layout);
    fields.optional("offset", operand.offset);
    fields.optional("bytes", operand.bytes);
    fields.optional("layer", operand.layer);
    return operand;
}

// bool before int, as Python's bools are ints too.
Attribute read_attribute(nb::handle value, const Fields& fields, const std::string& name) {
    if (nb::isinstance<nb::bool_>(value)) return nb::cast<bool>(value);
    if (nb::isinstance<nb::int_>(value)) return nb::cast<int64_t>(value);
    if (nb::isinstance<nb::float_>(value)) return nb::cast<double>(value);
    if (nb::isinstance<nb::str>(value)) return nb::cast<std::string>(value);
    throw fields.wrong("attribute '" + name + "' is neither a number, nor a string, nor a bool");
}

template <typename Read>
void read_mapping(Fields& fields, const char* name, const Read& read) {
    const nb::object entry = fields.take(name);
    if (!entry.is_valid()) return;
    if (!nb::isinstance<nb::dict>(entry)) throw fields.wrong("'" + std::string(name) + "' is not a dict");
    for (const auto& [key, value] : nb::borrow<nb::dict>(entry)) read(nb::cast<std::string>(nb::str(key)), value);
}

StateGroupSpec read_group(Fields& fields) {
    StateGroupSpec group;
    fields.required("name", group.name);
    fields.required("kind", group.kind);
    fields.optional("window", group.window);
    fields.optional("num_layers", group.num_layers);
    fields.required("block_size", group.block_size);
    fields.optional("block_bytes", group.block_bytes);
    fields.optional("num_kv_heads", group.num_kv_heads);
    fields.optional("head_dim", group.head_dim);
    fields.optional("dtype", group.dtype);
    return group;
}

RankSpec read_rank(Fields& fields) {
    RankSpec rank;
    fields.required("weights_path", rank.weights_path);
    fields.required("weights_file_bytes", rank.weights_file_bytes);
    fields.each("weights", [&](Fields& entry) {
        WeightSpec& weight = rank.weights.emplace_back();
        entry.required("name", weight.name);
        entry.required("layout", weight.layout);
        entry.required("offset", weight.offset);
        entry.required("bytes", weight.bytes);
    });
    fields.each("buffers", [&](Fields& entry) {
        BufferSpec& buffer = rank.buffers.emplace_back();
        entry.required("name", buffer.name);
        entry.required("bytes", buffer.bytes);
        entry.required("offset", buffer.offset);
        entry.optional("per_thread", buffer.per_thread);
        entry.optional("zeroed", buffer.zeroed);
        entry.optional("kept", buffer.kept);
    });
    fields.required("arena_bytes", rank.arena_bytes);
    fields.each("forward", [&](Fields& entry) { rank.forward.push_back(read_call(entry)); });
    fields.optional("gpu", rank.gpu);
    rank.launches = read_launches(fields, "launches");
    rank.sample = read_launches(fields, "sample");
    if (fields.has("draws")) {
        Fields draws(fields.take("draws"), "draws");
        draws.required("token", rank.draws.token);
        draws.required("logprob", rank.draws.logprob);
        draws.required("rank", rank.draws.rank);
        draws.required("top_tokens", rank.draws.top_tokens);
        draws.required("top_logprobs", rank.draws.top_logprobs);
        draws.required("top", rank.draws.top);
        draws.required("edit_slots", rank.draws.edit_slots);
        draws.finish();
    }
    fields.optional("logits_buffer", rank.logits_buffer);
    fields.optional("logits_stride", rank.logits_stride);
    return rank;
}

}  // namespace

std::vector<GuardRange> read_guard(Fields& fields, const std::string& of) {
    std::vector<GuardRange> ranges;
    const nb::object guards = fields.take("guard");
    if (!guards.is_valid()) return ranges;
    for (const nb::handle guard : guards) {
        GuardRange& range = ranges.emplace_back();
        if (nb::isinstance<nb::dict>(guard)) {
            Fields entry(guard, "guard of " + of);
            entry.required("variable", range.variable);
            entry.required("min", range.min);
            entry.required("max", range.max);
            entry.finish();
        } else {
            if (!nb::isinstance<nb::sequence>(guard) || nb::len(guard) != 3) {
                throw fields.wrong("a guard is neither a dict nor [variable, min, max]");
            }
            range = {nb::cast<std::string>(guard[0]), nb::cast<int64_t>(guard[1]), nb::cast<int64_t>(guard[2])};
        }
    }
    return ranges;
}

CallSpec read_call(Fields& fields) {
    CallSpec call;
    fields.required("op", call.op);
    fields.optional("version", call.version);
    fields.optional("region", call.region);
    read_mapping(fields, "operands", [&](const std::string& name, nb::handle value) {
        Fields operand(value, "operand '" + name + "' of " + call.op);
        call.operands.emplace(name, read_operand(operand));
        operand.finish();
    });
    read_mapping(fields, "attributes", [&](const std::string& name, nb::handle value) {
        call.attributes.emplace(name, read_attribute(value, fields, name));
    });
    call.guard = read_guard(fields, call.op);
    fields.optional("max_tokens", call.max_tokens);
    fields.optional("max_rows", call.max_rows);
    fields.optional("max_sequences", call.max_sequences);
    return call;
}

ExecutorSpec read_executor_spec(nb::handle values) {
    Fields fields(values, "spec");
    ExecutorSpec spec;
    fields.optional("isa", spec.isa);
    fields.each("ranks", [&](Fields& entry) { spec.ranks.push_back(read_rank(entry)); });
    fields.each("groups", [&](Fields& entry) { spec.groups.push_back(read_group(entry)); });
    fields.required("num_blocks", spec.num_blocks);
    fields.required("vocab_size", spec.vocab_size);
    fields.optional("num_threads", spec.num_threads);
    fields.required("max_tokens", spec.max_tokens);
    fields.required("max_rows", spec.max_rows);
    fields.required("max_sequences", spec.max_sequences);
    std::string pages = "auto";
    fields.optional("weight_pages", pages);
    spec.weight_pages = pages == "mapped" ? WeightPages::kMapped
                        : pages == "huge" ? WeightPages::kHuge
                                          : WeightPages::kAuto;
    if (const nb::object cuda = fields.take("cuda"); cuda.is_valid()) {
        Fields entry(cuda, "spec.cuda");
        spec.cuda = read_cuda_spec(entry);
        entry.finish();
    }
    fields.finish();
    return spec;
}

LoopConfig read_loop_config(nb::handle values) {
    Fields fields(values, "config");
    LoopConfig config;
    fields.required("max_model_len", config.max_model_len);
    fields.required("max_num_seqs", config.max_num_seqs);
    fields.required("max_num_batched_tokens", config.max_num_batched_tokens);
    fields.optional("mixed_prompt_tokens", config.mixed_prompt_tokens);
    fields.optional("enable_prefix_caching", config.enable_prefix_caching);
    fields.optional("capacity_scheduler_policy", config.capacity_scheduler_policy);
    fields.optional("expected_output_tokens", config.expected_output_tokens);
    fields.optional("max_preemptions", config.max_preemptions);
    fields.optional("rope_threshold", config.rope_threshold);
    fields.optional("rope_exact", config.rope_exact);
    fields.optional("manual_steps", config.manual_steps);
    fields.finish();
    return config;
}

Request read_request(nb::handle values) {
    Fields fields(values, "request");
    Request request;
    fields.required("prompt_token_ids", request.prompt_token_ids);
    fields.required("max_tokens", request.max_tokens);
    fields.optional("open_ended", request.open_ended);
    fields.optional("min_tokens", request.min_tokens);
    fields.optional("stop_token_ids", request.stop_token_ids);
    fields.optional("temperature", request.temperature);
    fields.optional("top_k", request.top_k);
    fields.optional("top_p", request.top_p);
    fields.optional("min_p", request.min_p);
    fields.optional("presence_penalty", request.presence_penalty);
    fields.optional("frequency_penalty", request.frequency_penalty);
    fields.optional("repetition_penalty", request.repetition_penalty);
    std::map<int32_t, float> logit_bias;
    fields.optional("logit_bias", logit_bias);
    request.logit_bias.assign(logit_bias.begin(), logit_bias.end());
    std::optional<int64_t> seed;  // as users know it: any integer of 64 bits, with sign
    fields.optional("seed", seed);
    if (seed.has_value()) request.seed = static_cast<uint64_t>(*seed);
    fields.optional("logprobs", request.logprobs);
    fields.optional("prompt_logprobs", request.prompt_logprobs);
    fields.optional("cache_salt", request.cache_salt);
    fields.finish();
    return request;
}

}  // namespace enginery
