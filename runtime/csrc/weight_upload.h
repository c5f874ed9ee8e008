// Brings a weights file to a device without holding it: read in pieces by many threads, each copied while the next is
// read.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_device.h"
#include "thread_pool.h"

namespace enginery {

// Bytes [begin, end) of a regular file of exactly `file_bytes`. Throws EngineFormatError.
void upload_weights(CudaDevice& device, ThreadPool& pool, const std::string& path, int64_t file_bytes, int64_t begin,
                    int64_t end, Address to);

}  // namespace enginery
