// The extension module `enginery.runtime._core`; its Python side is written down in _core.pyi.
#include <nanobind/ndarray.h>

#include "cuda_gpu.h"
#include "errors.h"
#include "executors.h"
#include "from_python.h"
#include "kernels_module.h"
#include "loop.h"
#include "sampler.h"

namespace enginery {

namespace {

const char* name_of(FinishReason reason) {
    switch (reason) {
        case FinishReason::kNone:
            break;
        case FinishReason::kStop:
            return "stop";
        case FinishReason::kLength:
            return "length";
        case FinishReason::kAbort:
            return "abort";
        case FinishReason::kError:
            return "error";
    }
    return nullptr;
}

nb::list to_list(const std::vector<TokenLogprob>& logprobs) {
    nb::list list;
    for (const TokenLogprob& entry : logprobs) {
        list.append(nb::make_tuple(entry.token_id, static_cast<double>(entry.logprob), entry.rank));
    }
    return list;
}

nb::object logprobs_of(const Output& output) {
    if (!output.has_logprobs) return nb::none();
    nb::list list;
    for (const auto& entry : output.logprobs) list.append(to_list(entry));
    return list;
}

nb::object prompt_logprobs_of(const Output& output) {
    if (!output.has_prompt_logprobs) return nb::none();
    nb::list list;
    list.append(nb::none());  // nothing comes before the first token
    for (const auto& entry : output.prompt_logprobs) list.append(to_list(entry));
    return list;
}

nb::dict stats_of(Loop& loop) {
    const LoopStats stats = loop.stats();
    nb::dict dict;
    dict["steps"] = stats.steps;
    dict["num_running"] = stats.num_running;
    dict["num_waiting"] = stats.num_waiting;
    dict["num_preemptions"] = stats.num_preemptions;
    dict["prompt_tokens"] = stats.prompt_tokens;
    dict["generation_tokens"] = stats.generation_tokens;
    dict["prefix_cache_queries"] = stats.prefix_cache_queries;
    dict["prefix_cache_hits"] = stats.prefix_cache_hits;
    dict["loop_seconds"] = stats.loop_seconds;
    dict["executor_seconds"] = stats.executor_seconds;
    dict["wake_seconds"] = stats.wake_seconds;
    nb::dict finished;
    for (size_t reason = 1; reason < kNumFinishReasons; ++reason) {
        finished[name_of(static_cast<FinishReason>(reason))] = stats.finished[reason];
    }
    dict["finished"] = finished;
    nb::list groups;
    double usage = 0;
    for (const GroupStats& group : stats.groups) {
        nb::dict entry;
        entry["name"] = group.name;
        entry["num_blocks"] = group.num_blocks;
        entry["used_blocks"] = group.used_blocks;
        entry["cached_blocks"] = group.cached_blocks;
        groups.append(entry);
        usage = std::max(usage, static_cast<double>(group.used_blocks) / group.num_blocks);
    }
    dict["groups"] = groups;
    dict["kv_cache_usage"] = usage;
    dict["internal_error"] =
        stats.internal_error.empty() ? nb::none() : nb::object(nb::str(stats.internal_error.c_str()));
    dict["memory"] = loop.memory();
    dict["sums_by"] = loop.sums_by();
    dict["weights_in"] = loop.weights_in();
    return dict;
}

void make_loop(Loop* loop, const nb::dict& spec_values, const nb::dict& config_values, const std::string& kind) {
    const ExecutorSpec spec = read_executor_spec(spec_values);
    const LoopConfig config = read_loop_config(config_values);
    const ExecutorFactory make = find_executor(kind);
    const nb::gil_scoped_release released;  // loading may take seconds
    new (loop) Loop(spec, config, make(spec));
}

// How many GPUs the driver shows; raises TargetError where that is none.
int32_t cuda_gpu_count() {
    const nb::gil_scoped_release released;
    return cuda::Gpu::count();
}

// What this GPU is; raises TargetError where it is not there or cannot be used.
nb::dict cuda_gpu(int32_t number) {
    const cuda::GpuInfo gpu = [number] {
        const nb::gil_scoped_release released;
        return cuda::Gpu::get(number).info();
    }();
    nb::dict dict;
    dict["name"] = gpu.name;
    dict["arch"] = gpu.arch;
    dict["driver"] = gpu.driver;
    dict["shared_bytes"] = gpu.shared_bytes;
    dict["free_bytes"] = gpu.free_bytes;
    dict["total_bytes"] = gpu.total_bytes;
    return dict;
}

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The sampler alone, for tests: the token and logprobs that a row of logits gives after output_token_ids.
nb::tuple sample_row(const Logits& logits, const nb::dict& request_values,
                     const std::vector<int32_t>& output_token_ids) {
    Request request = read_request(request_values);
    const auto vocab_size = static_cast<int32_t>(logits.size());
    check_request(request, {vocab_size, INT32_MAX - 1, INT32_MAX});
    TokenCounts counts;
    for (const int32_t token : request.prompt_token_ids) counts.try_emplace(token, 0);
    for (const int32_t token : output_token_ids) ++counts[token];
    const SampleInputs inputs{request, counts, request.seed.value_or(0), static_cast<int32_t>(output_token_ids.size())};
    SamplerScratch scratch;
    SampleResult result;
    sample(logits.data(), vocab_size, inputs, scratch, result);
    if (result.fault == SampleResult::Fault::kNonFinite) throw EngineryError("the logits are not finite");
    if (result.fault == SampleResult::Fault::kNothingAllowed) throw EngineryError("no token is allowed");
    return nb::make_tuple(result.token_id, to_list(result.logprobs));
}

// Typed errors arrive as the classes of engines/errors.py, which are looked up when the first one is thrown.
void translate(const std::exception_ptr& thrown, void*) {
    const auto raise = [](const char* name, const char* what) {
        const nb::object errors = nb::module_::import_("enginery.engines.errors");
        PyErr_SetString(errors.attr(name).ptr(), what);
    };
    try {
        std::rethrow_exception(thrown);
    } catch (const EngineFormatError& error) {
        raise("EngineFormatError", error.what());
    } catch (const TargetError& error) {
        raise("TargetError", error.what());
    } catch (const RequestError& error) {
        raise("RequestError", error.what());
    } catch (const CapacityError& error) {
        raise("CapacityError", error.what());
    } catch (const EngineryError& error) {
        raise("EngineryError", error.what());
    }
}

void bind_loop(nb::module_& module) {
    nb::class_<Output>(module, "Output")
        .def_ro("request_id", &Output::request_id)
        .def_ro("token_ids", &Output::token_ids)
        .def_prop_ro("logprobs", &logprobs_of)
        .def_prop_ro("prompt_logprobs", &prompt_logprobs_of)
        .def_prop_ro("finish_reason", [](const Output& output) { return name_of(output.finish_reason); })
        .def_prop_ro("stop_token_id",
                     [](const Output& output) {
                         return output.stop_token_id < 0 ? std::nullopt : std::optional(output.stop_token_id);
                     })
        .def_prop_ro(
            "error",
            [](const Output& output) { return output.error.empty() ? std::nullopt : std::optional(output.error); })
        .def_ro("num_cached_tokens", &Output::num_cached_tokens)
        .def_ro("arrival_time", &Output::arrival_time)
        .def_ro("first_scheduled_time", &Output::first_scheduled_time)
        .def_ro("first_token_time", &Output::first_token_time);

    nb::class_<Loop>(module, "Core")
        .def("__init__", &make_loop, nb::arg("spec"), nb::arg("config"), nb::arg("executor") = "cpu")
        .def(
            "submit", [](Loop& loop, const nb::dict& values) { return loop.submit(read_request(values)); },
            nb::arg("request"))
        .def("abort", &Loop::abort, nb::arg("request_id"))
        .def("wait", &Loop::wait, nb::arg("timeout_s"), nb::call_guard<nb::gil_scoped_release>())
        .def("step", &Loop::step, nb::call_guard<nb::gil_scoped_release>())
        .def("stats", &stats_of)
        .def("settle_weights", &Loop::settle_weights, nb::call_guard<nb::gil_scoped_release>())
        .def("stop_settling", &Loop::stop_settling)
        .def("fail", &Loop::fail, nb::arg("reason"))
        .def("close", &Loop::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace enginery

NB_MODULE(_core, module) {
    // A forked child ends with its parent's engines, which only the parent may close.
    nanobind::set_leak_warnings(false);
    nanobind::register_exception_translator(enginery::translate);
    enginery::bind_loop(module);
    enginery::bind_kernels(module);
    module.def("cuda_gpu_count", &enginery::cuda_gpu_count);
    module.def("cuda_gpu", &enginery::cuda_gpu, nanobind::arg("number") = 0);
    module.def("sample_row", &enginery::sample_row, nanobind::arg("logits"), nanobind::arg("request"),
               nanobind::arg("output_token_ids"));
}
