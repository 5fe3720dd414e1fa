// What a CPU build of kernels tells the stand-in driver. C, since driver and build are separate libraries.
#pragma once

#include <cstddef>
#include <cstdint>

struct StandinKernel {
  const char* name;
  int32_t n_parameters;
  const int32_t* parameter_bytes;
  // One block. False: it wrote behind its dynamic shared memory.
  bool (*run)(void** parameters, unsigned block, unsigned blocks, unsigned threads, size_t dynamic_shared);
  // The offset in Params of the first pointer that is_memory refuses; -1: none. Null pointers are not asked for.
  int32_t (*bad_pointer)(void** parameters, bool (*is_memory)(const void*));
};

// Exported by the build as `xlpk_standin_kernels`; ends with a null name.
using StandinKernels = const StandinKernel* (*)();
