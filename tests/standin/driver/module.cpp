// Modules: cubins, read as the ELF files that they are, and the launch of the CPU builds behind them.

#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "kernels.h"
#include "standin.h"

namespace standin {

namespace {

// What the cubin says of a kernel.
struct Function {
  std::string name;
  int registers = 0;
  int max_threads = 1024;
  size_t static_shared = 0;
  size_t parameter_bytes = 0;              // of all, as laid out
  std::map<int, std::pair<size_t, size_t>> parameters;  // ordinal -> offset, bytes
  size_t max_dynamic_shared = 48 << 10;
  const StandinKernel* kernel = nullptr;   // null: no CPU build was found
  bool launched = false;
};

struct Module {
  std::map<std::string, Function> functions;
};

constexpr unsigned char kMaxThreads = 0x05, kParameterBank = 0x0a, kParameter = 0x17, kRegisters = 0x2f;  // .nv.info attributes
constexpr size_t kOptinShared = 227 << 10;      // bytes a block may ask for
constexpr size_t kReservedShared = 1 << 10;     // bytes of the system's in each block
constexpr size_t kMultiprocessorShared = kOptinShared + kReservedShared;

bool lazy_loading() {
  const char* mode = std::getenv("CUDA_MODULE_LOADING");
  return !mode || std::strcmp(mode, "EAGER") != 0;
}

template <class Word>
Word word_at(const char* at) {
  Word word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

struct Elf {
  const char* image;
  const Elf64_Ehdr* header;
  const Elf64_Shdr* sections;
  const char* names;

  explicit Elf(const void* from)
      : image(static_cast<const char*>(from)),
        header(static_cast<const Elf64_Ehdr*>(from)),
        sections(reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff)),
        names(image + sections[header->e_shstrndx].sh_offset) {}

  std::string name(const Elf64_Shdr& section) const { return names + section.sh_name; }

  // The file ends where its last table or section does.
  size_t bytes() const {
    size_t end = std::max(header->e_shoff + size_t(header->e_shnum) * header->e_shentsize,
                          header->e_phoff + size_t(header->e_phnum) * header->e_phentsize);
    for (int i = 0; i < header->e_shnum; ++i)
      if (sections[i].sh_type != SHT_NOBITS) end = std::max(end, size_t(sections[i].sh_offset + sections[i].sh_size));
    return end;
  }
};

bool is_cubin(const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  constexpr int kCudaMachine = 190;
  return std::memcmp(image, ELFMAG, SELFMAG) == 0 && header->e_machine == kCudaMachine;
}

// Calls visit(attribute, payload, bytes) for each entry of a .nv.info section.
template <class Visit>
void for_each_info(const char* at, size_t bytes, Visit visit) {
  constexpr unsigned char kSized = 4;  // a 16-bit size and so many bytes follow; otherwise the 16 bits are the value
  for (const char* end = at + bytes; at + 4 <= end;) {
    const auto format = word_at<uint8_t>(at), attribute = word_at<uint8_t>(at + 1);
    const size_t size = format == kSized ? word_at<uint16_t>(at + 2) : 0;
    visit(attribute, at + 4, size);
    at += 4 + size;
  }
}

void read_functions(const Elf& elf, Module& module) {
  std::map<uint32_t, std::string> by_symbol;
  for (int i = 0; i < elf.header->e_shnum; ++i) {
    const Elf64_Shdr& section = elf.sections[i];
    if (section.sh_type != SHT_SYMTAB) continue;
    const char* names = elf.image + elf.sections[section.sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(elf.image + section.sh_offset);
    for (uint32_t s = 0; s < section.sh_size / sizeof(Elf64_Sym); ++s) {
      if (ELF64_ST_TYPE(symbols[s].st_info) != STT_FUNC || ELF64_ST_BIND(symbols[s].st_info) != STB_GLOBAL) continue;
      by_symbol[s] = names + symbols[s].st_name;
      module.functions[by_symbol[s]].name = by_symbol[s];
    }
  }
  for (int i = 0; i < elf.header->e_shnum; ++i) {
    const Elf64_Shdr& section = elf.sections[i];
    const std::string name = elf.name(section);
    const auto belongs_to = [&](const char* prefix) -> Function* {
      if (name.rfind(prefix, 0) != 0) return nullptr;
      const auto found = module.functions.find(name.substr(std::strlen(prefix)));
      return found == module.functions.end() ? nullptr : &found->second;
    };
    // From sm_90 on the section begins with the part that the system reserves.
    if (Function* function = belongs_to(".nv.shared."))
      function->static_shared = std::max(size_t(section.sh_size), kReservedShared) - kReservedShared;
    Function* function = belongs_to(".nv.info.");
    if (!function && name != ".nv.info") continue;
    for_each_info(elf.image + section.sh_offset, section.sh_size, [&](int attribute, const char* payload, size_t size) {
      if (!function) {
        const auto found = attribute == kRegisters && size >= 8 ? by_symbol.find(word_at<uint32_t>(payload)) : by_symbol.end();
        if (found != by_symbol.end()) module.functions[found->second].registers = int(word_at<uint32_t>(payload + 4));
      } else if (attribute == kMaxThreads && size >= 12) {
        function->max_threads = int(word_at<uint32_t>(payload) * word_at<uint32_t>(payload + 4) * word_at<uint32_t>(payload + 8));
      } else if (attribute == kParameterBank && size >= 8) {
        function->parameter_bytes = word_at<uint16_t>(payload + 6);
      } else if (attribute == kParameter && size >= 12) {
        const size_t offset = word_at<uint16_t>(payload + 6), parameter_bytes = word_at<uint32_t>(payload + 8) >> 18;
        function->parameters[word_at<uint16_t>(payload + 4)] = {offset, parameter_bytes};
      }
    });
  }
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The CPU build of a cubin: NAME.so beside the NAME.cubin in XLPK_STANDIN_KERNELS that is the same, byte for byte.
const StandinKernel* find_kernels(const char* image, size_t bytes) {
  const char* folder = std::getenv("XLPK_STANDIN_KERNELS");
  DIR* entries = folder ? opendir(folder) : nullptr;
  if (!entries) return nullptr;
  const StandinKernel* found = nullptr;
  while (const dirent* entry = found ? nullptr : readdir(entries)) {
    const std::string name = entry->d_name, suffix = ".cubin";
    if (name.size() <= suffix.size() || name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) continue;
    const std::string path = std::string(folder) + "/" + name;
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (size_t(file.tellg()) != bytes) continue;
    if (std::memcmp(read_file(path).data(), image, bytes) != 0) continue;
    const std::string library = path.substr(0, path.size() - suffix.size()) + ".so";
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    const auto kernels = handle ? reinterpret_cast<StandinKernels>(dlsym(handle, "xlpk_standin_kernels")) : nullptr;
    if (kernels) found = kernels();
    else complain("%s", dlerror());
  }
  closedir(entries);
  return found;
}

CUresult load(CUmodule* module, const void* image) {
  STANDIN_ENTER();
  if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (!is_cubin(image)) return CUDA_ERROR_INVALID_IMAGE;
  ++counters().module_loads;
  if (resident_kernels() > 0) ++counters().resident_module_loads;
  const Elf elf(image);
  auto* loaded = new Module;
  read_functions(elf, *loaded);
  for (const StandinKernel* kernel = find_kernels(elf.image, elf.bytes()); kernel && kernel->name; ++kernel) {
    const auto found = loaded->functions.find(kernel->name);
    if (found != loaded->functions.end()) found->second.kernel = kernel;
  }
  *module = reinterpret_cast<CUmodule>(loaded);
  return CUDA_SUCCESS;
}

bool is_device_memory(const void* address) { return memory_of(address, 1) != Memory::kNone; }

// Copies of a launch's arguments, laid out as the cubin says.
struct Arguments {
  std::vector<char> buffer;
  std::vector<void*> pointers;
};

// Null: they are not what the kernel takes.
std::shared_ptr<Arguments> copy_arguments(const Function& function, void** parameters, void** extra) {
  auto arguments = std::make_shared<Arguments>();
  arguments->buffer.resize(function.parameter_bytes);
  char* buffer = arguments->buffer.data();
  if (extra) {
    const void* from = nullptr;
    size_t bytes = 0;
    for (; *extra != CU_LAUNCH_PARAM_END; extra += 2) {
      if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) from = extra[1];
      if (*extra == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = *static_cast<size_t*>(extra[1]);
    }
    if (bytes != function.parameter_bytes) {
      complain("%s takes %zu bytes of arguments and was given %zu", function.name.c_str(), function.parameter_bytes, bytes);
      return nullptr;
    }
    std::memcpy(buffer, from, bytes);
  }
  for (const auto& [ordinal, place] : function.parameters) {
    if (!extra) std::memcpy(buffer + place.first, parameters[ordinal], place.second);
    arguments->pointers.push_back(buffer + place.first);
    if (int32_t(place.second) == function.kernel->parameter_bytes[ordinal]) continue;
    complain("%s: the CPU build and the cubin differ in argument %d", function.name.c_str(), ordinal);
    return nullptr;
  }
  return arguments;
}

std::atomic<uint64_t> failures{0};

int blocks_per_multiprocessor(const Function& function, int threads, size_t dynamic_shared) {
  const int warps = (threads + 31) / 32;
  const int registers = std::max(1, (function.registers + 7) / 8 * 8 * 32 * warps);
  const size_t shared = function.static_shared + dynamic_shared + kReservedShared;
  return std::min({32, 64 / warps, 65536 / registers, int(kMultiprocessorShared / shared)});
}

CUresult launch(Function* function, unsigned blocks, unsigned threads, size_t shared, CUstream stream, void** parameters,
                void** extra) {
  STANDIN_ENTER();
  if (!function || blocks == 0 || threads == 0) return CUDA_ERROR_INVALID_VALUE;
  const char* name = function->name.c_str();
  if (!function->kernel || int(function->parameters.size()) != function->kernel->n_parameters) {
    const char* folder = std::getenv("XLPK_STANDIN_KERNELS");
    complain("no CPU build of %s in XLPK_STANDIN_KERNELS=%s", name, folder ? folder : "");
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (int(threads) > function->max_threads) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  if (int(threads) != function->max_threads) {
    complain("%s takes blocks of %d threads, not %u", name, function->max_threads, threads);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (shared > function->max_dynamic_shared) {
    complain("%s may use %zu bytes of dynamic shared memory, not %zu", name, function->max_dynamic_shared, shared);
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int resident = blocks_per_multiprocessor(*function, int(threads), shared) * multiprocessors();
  if (resident == 0) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  const std::shared_ptr<Arguments> arguments = copy_arguments(*function, parameters, extra);
  if (!arguments) return CUDA_ERROR_INVALID_VALUE;
  const Stream* on = find_stream(stream);
  if (!on) return CUDA_ERROR_INVALID_HANDLE;
  if (!on->capture && launch_is_refused()) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  // Lazy loading brings a kernel to the device at its first launch, which may wait for what runs there.
  if (!function->launched && lazy_loading() && resident_kernels() > 0) ++counters().resident_module_loads;
  function->launched = true;
  const auto run = [=]() -> CUresult {
    if (fault_now("launch", failures)) return CUDA_ERROR_LAUNCH_FAILED;
    void** pointers = arguments->pointers.data();
    if (const int offset = function->kernel->bad_pointer(pointers, is_device_memory); offset >= 0) {
      complain("%s: the pointer at byte %d of Params leads to no device memory", function->name.c_str(), offset);
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    return run_blocks(function->name.c_str(), int(blocks), resident, [&](int block) {
      if (function->kernel->run(pointers, unsigned(block), blocks, threads, shared)) return true;
      complain("block %d of %s wrote behind its %zu bytes of shared memory", block, function->name.c_str(), shared);
      return false;
    });
  };
  return submit(stream, {Operation::kKernel, run, [] { ++counters().launches; }});
}

}  // namespace

bool launch_is_refused() {
  static std::atomic<uint64_t> attempts{0};
  return fault_now("launch_refused", attempts);
}

}  // namespace standin

using namespace standin;

static Function* function_of(CUfunction handle) { return reinterpret_cast<Function*>(handle); }

extern "C" {

CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  *mode = lazy_loading() ? CU_MODULE_LAZY_LOADING : CU_MODULE_EAGER_LOADING;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return load(module, image); }

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
  for (unsigned i = 0; i < count; ++i) {  // nothing is said in the logs
    const bool size = options[i] == CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES || options[i] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES;
    if (size) values[i] = nullptr;
  }
  return load(module, image);
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
  const std::vector<char> image = read_file(path);
  if (image.size() < sizeof(Elf64_Ehdr)) return CUDA_ERROR_FILE_NOT_FOUND;
  return load(module, image.data());
}

// The module is leaked: work that was queued may refer to it.
CUresult cuModuleUnload(CUmodule module) {
  STANDIN_ENTER();
  if (!module) return CUDA_ERROR_INVALID_HANDLE;
  return wait_for_all_streams();
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  STANDIN_ENTER();
  auto& functions = reinterpret_cast<Module*>(module)->functions;
  const auto found = functions.find(name);
  if (found == functions.end()) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(&found->second);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal(CUdeviceptr*, size_t*, CUmodule, const char*) {
  STANDIN_ENTER();
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  STANDIN_ENTER();
  Function* function = function_of(handle);
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || size_t(value) + function->static_shared > kOptinShared) return CUDA_ERROR_INVALID_VALUE;
  function->max_dynamic_shared = size_t(value);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
  STANDIN_ENTER();
  const Function* function = function_of(handle);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->max_threads; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = int(function->static_shared); break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = 90; break;
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = 90; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = int(function->max_dynamic_shared); break;
    default: *value = 0; break;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  STANDIN_ENTER();
  return CUDA_SUCCESS;
}

// Of the launches before cuLaunchKernel; PyCUDA still makes the call.
CUresult cuFuncSetBlockShape(CUfunction, int, int, int) {
  STANDIN_ENTER();
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int threads, size_t dynamic_shared) {
  STANDIN_ENTER();
  *blocks = blocks_per_multiprocessor(*function_of(handle), threads, dynamic_shared);
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction handle, int threads, size_t dynamic_shared,
                                                              unsigned) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, handle, threads, dynamic_shared);
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** parameters, void** extra) {
  if (grid_y * grid_z * block_y * block_z != 1) return CUDA_ERROR_NOT_SUPPORTED;
  return launch(function_of(handle), grid_x, block_x, shared, stream, parameters, extra);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
  if (config->numAttrs != 0) return CUDA_ERROR_NOT_SUPPORTED;
  return cuLaunchKernel(handle, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                        config->blockDimZ, config->sharedMemBytes, config->hStream, parameters, extra);
}

}  // extern "C"
