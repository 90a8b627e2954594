// What the runtime says about the machine's GPUs.
#pragma once

#include <stddef.h>

#include <string>

namespace pad {
namespace cuda {

// Why no kernel of this module can run on that device, by the runtime's number; empty if they can.
std::string device_error(int device);

// Bytes of shared memory that one block may ask for on the current device.
size_t shared_limit();

}  // namespace cuda
}  // namespace pad
