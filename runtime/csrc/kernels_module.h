// The part of the extension module that runs single operators.
#pragma once

#include <nanobind/nanobind.h>

namespace enginery {

// Adds cpu_features() and run_call() to the module (runtime/_core.pyi).
void bind_kernels(nanobind::module_& module);

}  // namespace enginery
