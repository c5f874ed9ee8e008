// Single operators for Python: what the tests and the compiler's checks run.
#include "kernels_module.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <chrono>

#include "call_reader.h"
#include "collectives.h"
#include "cpu_features.h"
#include "errors.h"
#include "executors.h"
#include "from_python.h"
#include "mapping.h"
#include "memory_nodes.h"
#include "thread_pool.h"

namespace enginery {

namespace {

using AnyArray = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Int32Array = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Int64Array = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;

template <class T>
T get(const nb::dict& from, const char* key, T otherwise) {
    return from.contains(key) ? nb::cast<T>(from[key]) : otherwise;
}

StateGroupSpec read_group(Fields fields) {
    StateGroupSpec group;
    fields.required("block_size", group.block_size);
    fields.required("block_bytes", group.block_bytes);
    fields.required("num_kv_heads", group.num_kv_heads);
    fields.required("head_dim", group.head_dim);
    fields.required("dtype", group.dtype);
    fields.required("num_layers", group.num_layers);
    fields.finish();
    return group;
}

// A step's arrays, kept alive beside the step that points into them.
struct StepArrays {
    Step step;
    std::vector<Int32Array> int32_arrays;
    std::vector<Int64Array> int64_arrays;

    const int32_t* read(const nb::dict& from, const char* key, int32_t& count) {
        if (!from.contains(key)) return nullptr;
        int32_arrays.push_back(nb::cast<Int32Array>(from[key]));
        count = static_cast<int32_t>(int32_arrays.back().size());
        return int32_arrays.back().data();
    }
};

void require(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

bool all_below(const int32_t* values, int32_t count, int64_t end) {
    return values == nullptr || std::all_of(values, values + count, [&](int32_t v) { return v >= 0 && v < end; });
}

StepArrays read_step(const nb::dict& from) {
    StepArrays arrays;
    Step& step = arrays.step;
    step.num_tokens = get<int32_t>(from, "num_tokens", 0);
    step.token_ids = arrays.read(from, "token_ids", step.num_tokens);
    step.positions = arrays.read(from, "positions", step.num_tokens);
    const auto of_tokens = [&](const char* key) {
        int32_t count = step.num_tokens;
        const int32_t* data = arrays.read(from, key, count);
        require(count == step.num_tokens, "the step's arrays of tokens differ in length");
        return data;
    };
    step.token_ids = of_tokens("token_ids");
    step.token_sequence = of_tokens("token_sequence");
    step.prompt_lengths = of_tokens("prompt_lengths");
    step.num_rows = get<int32_t>(from, "num_rows", 0);
    step.rows = arrays.read(from, "rows", step.num_rows);
    require(all_below(step.rows, step.num_rows, step.num_tokens), "a row is no token of the step");
    int32_t starts = 1;
    step.query_start = arrays.read(from, "query_start", starts);
    step.num_sequences = std::max(starts - 1, get<int32_t>(from, "num_sequences", 0));
    require(all_below(step.positions, step.num_tokens, INT32_MAX), "a position is negative");
    for (const nb::handle item : get<nb::list>(from, "groups", nb::list())) {
        const auto group = nb::cast<nb::dict>(item);
        GroupStep& to = step.groups.emplace_back();
        if (group.contains("block_table")) {
            arrays.int32_arrays.push_back(nb::cast<Int32Array>(group["block_table"]));
            const Int32Array& table = arrays.int32_arrays.back();
            require(table.ndim() == 2, "a block table has a row for each sequence");
            step.num_sequences = std::max(step.num_sequences, static_cast<int32_t>(table.shape(0)));
            to.block_table = table.data();
            to.max_blocks = static_cast<int32_t>(table.shape(1));
        }
        if (group.contains("slots")) {
            arrays.int64_arrays.push_back(nb::cast<Int64Array>(group["slots"]));
            require(arrays.int64_arrays.back().size() == static_cast<size_t>(step.num_tokens),
                    "slots are one for each token");
            to.slots = arrays.int64_arrays.back().data();
        }
    }
    require(all_below(step.token_sequence, step.num_tokens, step.num_sequences), "a token's sequence does not exist");
    return arrays;
}

// Slots and blocks that `group`'s arena does not have would be read and written beside it.
void check_group(const Step& step, size_t index, const StateGroupSpec& group, int32_t num_blocks) {
    require(index < step.groups.size(), "the step lacks a state group");
    const GroupStep& at = step.groups[index];
    for (int32_t token = 0; at.slots != nullptr && token < step.num_tokens; ++token) {
        require(at.slots[token] < int64_t{num_blocks} * group.block_size, "a slot is beyond the state");
    }
    if (at.block_table == nullptr || step.positions == nullptr) return;
    require(step.token_sequence != nullptr, "attention needs token_sequence");
    for (int32_t token = 0; token < step.num_tokens; ++token) {
        require(step.positions[token] / group.block_size < at.max_blocks, "a position is beyond its block table");
    }
    const int64_t entries = int64_t{at.max_blocks} * step.num_sequences;
    for (int64_t i = 0; i < entries; ++i) require(at.block_table[i] < num_blocks, "a block is beyond the state");
}

KernelFactory find_factory(const std::string& isa, const CallSpec& call) {
    for (const KernelEntry& entry : find_kernels(isa)) {
        if (call.op == entry.op && call.version == entry.version) return entry.make;
    }
    throw EngineFormatError("This runtime has no CPU operator '" + call.op + "' in version " +
                            std::to_string(call.version) + ".");
}

// A call outside of a plan, bound to arrays: beside its own fields it has the state groups and the operands that every
// thread has a copy of.
struct LoneCall {
    CallSpec call;
    std::vector<StateGroupSpec> groups;
    std::vector<std::string> per_thread;
    std::vector<int32_t> num_blocks;
    std::vector<AnyArray> kept;
    std::unique_ptr<Kernel> kernel;
    std::atomic<int64_t> counter{0};

    LoneCall(const std::string& isa, const nb::dict& from, const nb::dict& arrays, const Step& step,
             int32_t num_threads, Collectives& collectives) {
        Fields fields(from, "call");
        if (const nb::object list = fields.take("groups"); list.is_valid()) {
            for (const nb::handle group : list) groups.push_back(read_group(Fields(group, "call.groups")));
        }
        fields.optional("per_thread", per_thread);
        call = read_call(fields);
        fields.finish();
        if (!from.contains("max_tokens")) call.max_tokens = step.num_tokens;
        if (!from.contains("max_rows")) call.max_rows = step.num_rows;
        if (!from.contains("max_sequences")) call.max_sequences = step.num_sequences;
        require(call.max_tokens >= step.num_tokens && call.max_rows >= step.num_rows,
                "the step is larger than the call's");
        num_blocks.resize(groups.size());
        Binding binding;
        binding.num_threads = num_threads;
        binding.collectives = &collectives;
        for (const auto [key, value] : arrays) bind(nb::cast<std::string>(key), value, step, binding);
        binding.groups = groups;
        binding.num_blocks = num_blocks;
        kernel = find_factory(isa, call)(call, binding);
    }

  private:
    void bind(const std::string& name, const nb::handle& value, const Step& step, Binding& binding) {
        const auto found = call.operands.find(name);
        require(found != call.operands.end(), ("there is an array but no operand " + name).c_str());
        OperandSpec& operand = found->second;
        const AnyArray& array = kept.emplace_back(nb::cast<AnyArray>(value));
        BoundOperand bound{static_cast<std::byte*>(array.data()), 0};
        operand.bytes = static_cast<int64_t>(array.nbytes());
        if (std::find(per_thread.begin(), per_thread.end(), name) != per_thread.end()) {
            operand.bytes = operand.bytes / binding.num_threads / 4 * 4;
            bound.thread_stride = operand.bytes;
        }
        const auto index = static_cast<size_t>(operand.index);
        if (operand.kind == OperandKind::kState && operand.index >= 0 && index < groups.size()) {
            num_blocks[index] = static_cast<int32_t>(operand.bytes / std::max<int64_t>(1, groups[index].block_bytes));
            check_group(step, index, groups[index], num_blocks[index]);
        }
        binding.operands[name] = bound;
    }
};

double run_calls(const std::string& isa, const nb::list& calls, const nb::list& arrays, const nb::dict& step_fields,
                 int32_t num_threads) {
    require(num_threads >= 1 && num_threads <= 256, "num_threads is from 1 to 256");
    require(calls.size() == arrays.size(), "calls and operands differ in number");
    const StepArrays step_arrays = read_step(step_fields);
    const Step& step = step_arrays.step;
    Collectives collectives({num_threads}, should_spin(num_threads));
    std::vector<std::unique_ptr<LoneCall>> bound;
    for (size_t i = 0; i < calls.size(); ++i) {
        bound.push_back(std::make_unique<LoneCall>(isa, nb::cast<nb::dict>(calls[i]), nb::cast<nb::dict>(arrays[i]),
                                                   step, num_threads, collectives));
    }
    const Mapping scratch = Mapping::of_zeros(kThreadScratchBytes * num_threads + kSharedScratchBytes, "scratch");
    Barrier barrier(num_threads, should_spin(num_threads), "run_calls");
    ThreadPool pool(num_threads);
    double seconds = 0;
    const nb::gil_scoped_release release;
    pool.run([&](int32_t thread) {
        Team team;
        team.thread = thread;
        team.num_threads = num_threads;
        team.scratch = scratch.data() + kThreadScratchBytes * thread;
        team.shared_scratch = scratch.data() + kThreadScratchBytes * num_threads;
        team.shared_scratch_bytes = kSharedScratchBytes;
        try {
            barrier.wait();
            const auto started = std::chrono::steady_clock::now();
            for (const auto& one : bound) {
                team.counter = &one->counter;
                one->kernel->run(step, team);
                barrier.wait();
            }
            const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - started;
            if (thread == 0) seconds = passed.count();
        } catch (...) {
            barrier.fail();
            throw;
        }
    });
    return seconds;
}

using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Logits copy_logits(Executor& executor, int32_t rows, int32_t columns) {
    auto* copy = new float[static_cast<size_t>(rows) * static_cast<size_t>(columns)];
    nb::capsule owner(copy, [](void* data) noexcept { delete[] static_cast<float*>(data); });
    for (int32_t row = 0; row < rows; ++row) {
        std::copy_n(executor.logits(row), columns, copy + int64_t{row} * columns);
    }
    return Logits(copy, {static_cast<size_t>(rows), static_cast<size_t>(columns)}, owner);
}

nb::tuple run_forward(const nb::dict& spec_fields, const nb::list& steps, const std::string& kind) {
    const ExecutorSpec spec = read_executor_spec(spec_fields);
    const std::unique_ptr<Executor> executor = find_executor(kind)(spec);
    nb::list results;
    for (const nb::handle fields : steps) {
        const StepArrays arrays = read_step(nb::cast<nb::dict>(fields));
        for (size_t group = 0; group < spec.groups.size(); ++group) {
            check_group(arrays.step, group, spec.groups[group], spec.num_blocks[group]);
        }
        {
            const nb::gil_scoped_release release;
            executor->launch(arrays.step);
            executor->collect();
        }
        results.append(copy_logits(*executor, arrays.step.num_rows, spec.vocab_size));
    }
    return nb::make_tuple(results, executor->memory());
}

}  // namespace

void bind_kernels(nb::module_& module) {
    module.def("cpu_features", &cpu_features, "The ISA features of this machine that targets ask for.");
    module.def("nodes_of_cpus", &nodes_of_cpus, nb::arg("cpus"), nb::arg("root") = "/sys/devices/system/node",
               "The memory nodes that CPUs belong to.");
    module.def("run_calls", &run_calls, nb::arg("isa"), nb::arg("calls"), nb::arg("operands"), nb::arg("step"),
               nb::arg("num_threads") = 1, "Runs operators' kernels on arrays, in place; the seconds that it took.");
    module.def("run_forward", &run_forward, nb::arg("spec"), nb::arg("steps"), nb::arg("executor") = "cpu",
               "Runs steps one after another without a serving loop: the logits of each, and memory by purpose.");
}

}  // namespace enginery
