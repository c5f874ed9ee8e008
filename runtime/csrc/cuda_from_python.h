// The CUDA part of the executor's spec, from the dicts that Python hands over.
#pragma once

#include "fields.h"
#include "launch.h"

namespace enginery {

CudaSpec read_cuda_spec(Fields& fields);

// The launches under `name`, in order; none where there is no such entry, as on a CPU.
std::vector<LaunchSpec> read_launches(Fields& fields, const char* name);

}  // namespace enginery
