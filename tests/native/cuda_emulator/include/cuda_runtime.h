// The toolkit's header, with the two templates that need a GPU replaced.
#pragma once
#include_next <cuda_runtime.h>

#include "../device.h"
#define cudaLaunchKernelEx emulated_launch
#define cudaFuncSetAttribute emulated_set_attribute
