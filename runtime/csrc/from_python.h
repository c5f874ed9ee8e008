// The structs of the core from the dicts that Python hands over, field by field under their names.
#pragma once

#include "call.h"
#include "executor.h"
#include "fields.h"
#include "loop.h"
#include "request.h"

namespace enginery {

CallSpec read_call(Fields& fields);
std::vector<GuardRange> read_guard(Fields& fields, const std::string& of);
ExecutorSpec read_executor_spec(nb::handle values);
LoopConfig read_loop_config(nb::handle values);
Request read_request(nb::handle values);

}  // namespace enginery
