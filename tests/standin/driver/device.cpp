// Errors, faults, the device and contexts.

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "standin.h"

Counters xlpk_standin_counters;

namespace standin {

namespace {

std::atomic<int> sticky{CUDA_SUCCESS};
std::atomic<bool> initialised{false};

// Handles are addresses of these.
struct Context {
  int references = 0;
};
Context primary;
std::mutex contexts_mutex;

thread_local std::vector<CUcontext> current;

CUcontext handle(Context& context) { return reinterpret_cast<CUcontext>(&context); }

}  // namespace

void complain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("stand-in driver: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* value = std::getenv((std::string("XLPK_STANDIN_") + name).c_str());
  return value && *value ? std::strtoull(value, nullptr, 10) : otherwise;
}

bool fault(const char* name, uint64_t* number) {
  const char* asked = std::getenv("XLPK_STANDIN_FAULT");
  const size_t length = std::strlen(name);
  for (const char* at = asked; at && *at;) {
    const char* end = std::strchr(at, ',');
    if (std::strncmp(at, name, length) == 0 && (at[length] == 0 || at[length] == ',' || at[length] == ':')) {
      if (number) *number = at[length] == ':' ? std::strtoull(at + length + 1, nullptr, 10) : 0;
      return true;
    }
    at = end ? end + 1 : nullptr;
  }
  return false;
}

bool fault_now(const char* name, std::atomic<uint64_t>& calls) {
  uint64_t number = 0;
  return fault(name, &number) && ++calls == number;
}

bool fault_from_now(const char* name, std::atomic<uint64_t>& calls) {
  uint64_t number = 0;
  return fault(name, &number) && ++calls >= number;
}

CUresult sticky_error() { return CUresult(sticky.load()); }

void set_sticky_error(CUresult error) {
  int none = CUDA_SUCCESS;
  sticky.compare_exchange_strong(none, error);
}

CUresult enter() {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (CUresult error = sticky_error(); error != CUDA_SUCCESS) return error;
  return current.empty() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

int multiprocessors() { return int(setting("SMS", 4)); }

}  // namespace standin

using namespace standin;

extern "C" {

CUresult cuInit(unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  initialised = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  switch (int(error)) {
#define STANDIN_ERROR(code, text) \
  case code:                      \
    *name = #code;                \
    return CUDA_SUCCESS;
#include "errors.inc"
#undef STANDIN_ERROR
  }
  *name = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (int(error)) {
#define STANDIN_ERROR(code, words) \
  case code:                       \
    *text = words;                 \
    return CUDA_SUCCESS;
#include "errors.inc"
#undef STANDIN_ERROR
  }
  *text = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetProcAddress(const char* symbol, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&xlpk_standin_counters), &self);
  void* library = dlopen(self.dli_fname, RTLD_NOW);
  *function = nullptr;
  for (const char* version : {"_v4", "_v3", "_v2", ""}) {
    if (!*function) *function = dlsym(library, (std::string(symbol) + version).c_str());
  }
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuDeviceGetCount(int* count) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  *count = int(setting("DEVICES", 1));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (ordinal < 0 || uint64_t(ordinal) >= setting("DEVICES", 1)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::snprintf(name, size_t(size), "xlpk stand-in driver (no GPU)");
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice) {
  std::memcpy(uuid->bytes, "xlpk stand-in  ", 16);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char* id, int size, CUdevice) {
  std::snprintf(id, size_t(size), "0000:00:00.0");
  return CUDA_SUCCESS;
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice) {
  *major = 9;
  *minor = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) {
  *bytes = setting("MEMORY", uint64_t(2) << 30);
  return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice) {
  *can = 0;
  return CUDA_SUCCESS;
}

// Figures of an H100 where nothing here limits them.
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 2147483647; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: *value = 65535; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: *value = 1 << 10; break;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: *value = 64 << 10; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors(); break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1000000; break;         // kHz
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1000000; break;  // kHz
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 64; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 2; break;
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: *value = 2147483647; break;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: *value = 512; break;
    default: *value = 0; break;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (CUresult error = sticky_error(); error != CUDA_SUCCESS) return error;
  std::lock_guard<std::mutex> lock(contexts_mutex);
  ++primary.references;
  *context = handle(primary);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) {
  std::lock_guard<std::mutex> lock(contexts_mutex);
  if (primary.references == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--primary.references == 0) {
    if (CUresult error = wait_for_all_streams(); error != CUDA_SUCCESS) return error;
    retire_streams();
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = primary.references > 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxSetFlags(CUdevice, unsigned) { return CUDA_SUCCESS; }

CUresult cuCtxCreate(CUcontext* context, CUctxCreateParams*, unsigned, CUdevice) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  *context = handle(*new Context{1});
  current.push_back(*context);
  return CUDA_SUCCESS;
}

CUresult cuCtxDestroy(CUcontext context) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  const CUresult error = wait_for_all_streams();
  if (!current.empty() && current.back() == context) current.pop_back();
  return error;
}

CUresult cuCtxAttach(CUcontext* context, unsigned) {
  STANDIN_ENTER();
  *context = current.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxDetach(CUcontext context) { return cuCtxDestroy(context); }

CUresult cuCtxPushCurrent(CUcontext context) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  current.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = current.back();
  current.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  if (!current.empty()) current.pop_back();
  if (context) current.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current.empty() ? nullptr : current.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  STANDIN_ENTER();
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
  STANDIN_ENTER();
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  ++counters().syncs;
  return wait_for_all_streams();
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  STANDIN_ENTER();
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) {
  STANDIN_ENTER();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCacheConfig(CUfunc_cache) {
  STANDIN_ENTER();
  return CUDA_SUCCESS;
}

}  // extern "C"
