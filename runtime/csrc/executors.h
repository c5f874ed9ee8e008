// The executors by name, as Core is asked for them.
#pragma once

#include <memory>
#include <string>

#include "executor.h"

namespace enginery {

using ExecutorFactory = std::unique_ptr<Executor> (*)(const ExecutorSpec& spec);

// "cpu", "cuda", "null" or "cuda-null". Raises TypeError, which names them.
ExecutorFactory find_executor(const std::string& name);

}  // namespace enginery
