// The CUDA part of the executor's spec, from the dicts that Python hands over.
#pragma once

#include "fields.h"
#include "launch.h"

namespace enginery {

CudaSpec read_cuda_spec(Fields& fields);

}  // namespace enginery
