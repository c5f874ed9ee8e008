// Typed errors of the core. module.cpp translates each to the Python class of the same name (engines/errors.py).
#pragma once

#include <stdexcept>
#include <string>

namespace enginery {

struct EngineryError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct EngineFormatError : EngineryError {  // the engine's bytes are not what the format allows
    using EngineryError::EngineryError;
};
struct TargetError : EngineryError {  // the engine and this machine do not fit
    using EngineryError::EngineryError;
};
struct RequestError : EngineryError {  // one request asks for what cannot be
    using EngineryError::EngineryError;
};
struct CapacityError : EngineryError {  // memory or slots do not suffice
    using EngineryError::EngineryError;
};

}  // namespace enginery
