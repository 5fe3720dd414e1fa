// Memory. Each allocation lies at the end of its own pages with an unmapped page behind it, and is filled with garbage.

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "standin.h"

namespace standin {

namespace {

struct Allocation {
  size_t bytes;
  Memory kind;
  unsigned flags;
  char* pages;  // null: the caller's own memory, registered
  size_t mapped;
};

std::mutex mutex;
std::map<uintptr_t, Allocation> allocations;  // by first byte
uint64_t device_bytes = 0;
std::atomic<uint64_t> device_allocations{0};

constexpr size_t kAlign = 256;
constexpr int kGarbage = 0xff;  // NaN as a float, -1 as an integer

// Under the mutex; the end if there is none.
std::map<uintptr_t, Allocation>::iterator holder(const void* address) {
  const auto at = uintptr_t(address);
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return allocations.end();
  --next;
  return at < next->first + next->second.bytes ? next : allocations.end();
}

void count_allocation() {
  ++counters().allocations;
  if (resident_kernels() > 0) ++counters().resident_allocations;
}

void count_free() {
  ++counters().frees;
  if (resident_kernels() > 0) ++counters().resident_frees;
}

CUresult allocate(void** address, size_t bytes, Memory kind, unsigned flags) {
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const bool on_device = kind != Memory::kPinned;
  if (on_device && fault_from_now("oom", device_allocations)) return CUDA_ERROR_OUT_OF_MEMORY;
  count_allocation();
  std::lock_guard<std::mutex> lock(mutex);
  size_t total = 0;
  cuDeviceTotalMem(&total, 0);
  if (on_device && (bytes > total || device_bytes > total - bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t used = (bytes + kAlign - 1) / kAlign * kAlign;
  const size_t mapped = (used + page - 1) / page * page + page;
  void* pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  mprotect(static_cast<char*>(pages) + mapped - page, page, PROT_NONE);
  char* begin = static_cast<char*>(pages) + mapped - page - used;
  std::memset(begin, kGarbage, bytes);
  if (on_device) device_bytes += bytes;
  allocations[uintptr_t(begin)] = Allocation{bytes, kind, flags, static_cast<char*>(pages), mapped};
  *address = begin;
  return CUDA_SUCCESS;
}

// Waits for every kernel first, as a GPU's driver does.
CUresult release(void* address, bool pinned) {
  STANDIN_ENTER();
  if (!address) return CUDA_SUCCESS;
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = allocations.find(uintptr_t(address));
    if (found == allocations.end() || !found->second.pages || (found->second.kind == Memory::kPinned) != pinned)
      return CUDA_ERROR_INVALID_VALUE;
  }
  count_free();
  if (CUresult error = wait_for_all_streams(); error != CUDA_SUCCESS) return error;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(uintptr_t(address));
  if (found == allocations.end()) return CUDA_ERROR_INVALID_VALUE;
  if (!pinned) device_bytes -= found->second.bytes;
  munmap(found->second.pages, found->second.mapped);
  allocations.erase(found);
  return CUDA_SUCCESS;
}

enum class Direction { kToDevice, kToHost, kOnDevice };

bool on_device(const void* address, size_t bytes) { return memory_of(address, bytes) != Memory::kNone; }
bool on_host(const void* address, size_t bytes) { return memory_of(address, bytes) != Memory::kDevice; }

CUresult check_copy(Direction direction, const void* to, const void* from, size_t bytes) {
  const bool good = (direction == Direction::kToHost ? on_host(to, bytes) : on_device(to, bytes)) &&
                    (direction == Direction::kToDevice ? on_host(from, bytes) : on_device(from, bytes));
  if (!good) {
    complain("a copy of %zu bytes from %p to %p leaves its allocation or is on the wrong side", bytes, from, to);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

void count_copy(Direction direction, size_t bytes) {
  if (direction == Direction::kToDevice) ++counters().h2d_copies, counters().h2d_bytes += bytes;
  if (direction == Direction::kToHost) ++counters().d2h_copies, counters().d2h_bytes += bytes;
}

CUresult copy(Direction direction, void* to, const void* from, size_t bytes) {
  STANDIN_ENTER();
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (bytes == 0) return CUDA_SUCCESS;
  if (CUresult error = check_copy(direction, to, from, bytes); error != CUDA_SUCCESS) return error;
  count_copy(direction, bytes);
  if (resident_kernels() > 0) ++counters().resident_default_stream;
  if (CUresult error = wait_for_blocking_streams(); error != CUDA_SUCCESS) return error;
  std::memmove(to, from, bytes);
  return CUDA_SUCCESS;
}

// Page-locked memory is read and written when the stream comes to it. Pageable memory is read at once, and the call waits until it
// is written. A captured copy uses the memory when the graph runs.
CUresult copy_async(Direction direction, void* to, const void* from, size_t bytes, CUstream stream) {
  STANDIN_ENTER();
  if (bytes == 0) return CUDA_SUCCESS;
  Stream* on = find_stream(stream);
  if (!on) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult error = check_copy(direction, to, from, bytes); error != CUDA_SUCCESS) return error;
  const void* host = direction == Direction::kToDevice ? from : to;
  const bool pageable = direction != Direction::kOnDevice && memory_of(host, bytes) == Memory::kNone && !on->capture;
  const auto count = [=] { count_copy(direction, bytes); };
  if (pageable && direction == Direction::kToDevice) {
    const char* begin = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
    return submit(stream, {Operation::kCopy, [=] { return std::memcpy(to, staged->data(), bytes), CUDA_SUCCESS; }, count});
  }
  const auto run = [=] { return std::memmove(to, from, bytes), CUDA_SUCCESS; };
  const CUresult result = submit(stream, {Operation::kCopy, run, count});
  return result == CUDA_SUCCESS && pageable ? on->wait() : result;
}

template <class Word>
CUresult fill(CUdeviceptr at, Word word, size_t count, CUstream stream) {
  STANDIN_ENTER();
  if (count == 0) return CUDA_SUCCESS;
  auto* begin = reinterpret_cast<Word*>(at);
  if (!on_device(begin, count * sizeof(Word))) return CUDA_ERROR_INVALID_VALUE;
  const auto run = [=] {
    for (size_t i = 0; i < count; ++i) begin[i] = word;
    return CUDA_SUCCESS;
  };
  return submit(stream, {Operation::kMemset, run});
}

template <class Word>
CUresult fill_now(CUdeviceptr at, Word word, size_t count) {
  STANDIN_ENTER();
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (CUresult error = fill(at, word, count, nullptr); error != CUDA_SUCCESS) return error;
  return find_stream(nullptr)->wait();
}

}  // namespace

Memory memory_of(const void* address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = holder(address);
  if (found == allocations.end()) return Memory::kNone;
  return uintptr_t(address) + bytes <= found->first + found->second.bytes ? found->second.kind : Memory::kNone;
}

}  // namespace standin

using namespace standin;

static void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

extern "C" {

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  STANDIN_ENTER();
  return allocate(reinterpret_cast<void**>(address), bytes, Memory::kDevice, 0);
}

CUresult cuMemAllocManaged(CUdeviceptr* address, size_t bytes, unsigned flags) {
  STANDIN_ENTER();
  return allocate(reinterpret_cast<void**>(address), bytes, Memory::kManaged, flags);
}

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned flags) {
  STANDIN_ENTER();
  return allocate(address, bytes, Memory::kPinned, flags);
}

CUresult cuMemAllocHost(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
CUresult cuMemFree(CUdeviceptr address) { return release(pointer(address), false); }
CUresult cuMemFreeHost(void* address) { return release(address, true); }

CUresult cuMemHostRegister(void* address, size_t bytes, unsigned flags) {
  STANDIN_ENTER();
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  count_allocation();
  std::lock_guard<std::mutex> lock(mutex);
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (holder(address) != allocations.end()) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  allocations[uintptr_t(address)] = Allocation{bytes, Memory::kPinned, flags, nullptr, 0};
  return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void* address) {
  STANDIN_ENTER();
  count_free();
  if (CUresult error = wait_for_all_streams(); error != CUDA_SUCCESS) return error;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(uintptr_t(address));
  if (found == allocations.end() || found->second.pages) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  allocations.erase(found);
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned) {
  STANDIN_ENTER();
  if (memory_of(host, 1) != Memory::kPinned) return CUDA_ERROR_INVALID_VALUE;
  *device = CUdeviceptr(host);
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetFlags(unsigned* flags, void* host) {
  STANDIN_ENTER();
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = holder(host);
  if (found == allocations.end() || found->second.kind != Memory::kPinned) return CUDA_ERROR_INVALID_VALUE;
  *flags = found->second.flags;
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  STANDIN_ENTER();
  cuDeviceTotalMem(total, 0);
  std::lock_guard<std::mutex> lock(mutex);
  *free = *total - device_bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  STANDIN_ENTER();
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = holder(pointer(address));
  if (found == allocations.end()) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = CUdeviceptr(found->first);
  if (bytes) *bytes = found->second.bytes;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  STANDIN_ENTER();
  const Memory kind = memory_of(pointer(address), 1);
  if (kind == Memory::kNone) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(value) = kind == Memory::kPinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<CUdeviceptr*>(value) = address;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (kind == Memory::kDevice) return CUDA_ERROR_INVALID_VALUE;
      *static_cast<void**>(value) = pointer(address);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *static_cast<unsigned*>(value) = kind == Memory::kManaged;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(value) = 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
  return copy(Direction::kToDevice, pointer(to), from, bytes);
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) { return copy(Direction::kToHost, to, pointer(from), bytes); }

CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy(Direction::kOnDevice, pointer(to), pointer(from), bytes);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return copy_async(Direction::kToDevice, pointer(to), from, bytes, stream);
}

CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy_async(Direction::kToHost, to, pointer(from), bytes, stream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy_async(Direction::kOnDevice, pointer(to), pointer(from), bytes, stream);
}

CUresult cuMemsetD8(CUdeviceptr at, unsigned char word, size_t count) { return fill_now(at, uint8_t(word), count); }
CUresult cuMemsetD16(CUdeviceptr at, unsigned short word, size_t count) { return fill_now(at, uint16_t(word), count); }
CUresult cuMemsetD32(CUdeviceptr at, unsigned word, size_t count) { return fill_now(at, uint32_t(word), count); }

CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char word, size_t count, CUstream stream) {
  return fill(at, uint8_t(word), count, stream);
}

CUresult cuMemsetD16Async(CUdeviceptr at, unsigned short word, size_t count, CUstream stream) {
  return fill(at, uint16_t(word), count, stream);
}

CUresult cuMemsetD32Async(CUdeviceptr at, unsigned word, size_t count, CUstream stream) {
  return fill(at, uint32_t(word), count, stream);
}

}  // extern "C"
