// AMX for a processor without it: to be preloaded. Catches the illegal instructions of tile code, carries them out on memory of
// the thread, and grants the permission that the kernel refuses. What the compiler made runs as it is: operands, addresses,
// shapes. XL_TRAPS_WRONG in the environment: products lose their last column's sign, as no processor should.

#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "platform/platform.h"

using namespace xl;

namespace {

struct Tile {
  uint32_t words[16][16];
  int rows, row_bytes;
};

__attribute__((tls_model("initial-exec"))) thread_local Tile tiles[8];
__attribute__((tls_model("initial-exec"))) thread_local bool configured = false;
bool wrong = false;
uint64_t trapped[6] = {};  // in the order of tile_traps_count

void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "tile_traps: %s\n", what);
  _exit(99);
}

// An instruction with VEX prefix C4 in the map 0F38.
struct Instruction {
  const uint8_t* at;
  const ucontext_t& context;

  int pp() const { return at[2] & 3; }
  int opcode() const { return at[3]; }
  int vvvv() const { return ~at[2] >> 3 & 15; }
  int mod() const { return at[4] >> 6; }
  int reg() const { return at[4] >> 3 & 7; }
  int rm() const { return at[4] & 7; }
  bool tile_code() const { return at[0] == 0xc4 && (at[1] & 31) == 2 && (at[2] & 0x84) == 0; }  // W0, 128 bits

  uint64_t general(int number) const {
    static const int kPlace[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return uint64_t(context.uc_mcontext.gregs[kPlace[number]]);
  }

  // The memory operand: where it starts, the index register (the distance of rows), and the length of the instruction.
  uint64_t memory(uint64_t& index, int& length) const {
    require(mod() != 3, "a memory operand was expected");
    uint64_t address = 0;
    int used = 5, base = rm();
    index = 0;
    if (base == 4) {
      const int sib = at[used++], number = (sib >> 3 & 7) | (~at[1] >> 6 & 1) << 3;
      base = sib & 7;
      if (number != 4) index = general(number) << (sib >> 6);
    }
    require(!(base == 5 && mod() == 0), "no base register");
    address += general(base | (~at[1] >> 5 & 1) << 3);
    if (mod() == 1) {
      address += uint64_t(int64_t(int8_t(at[used])));
      used += 1;
    } else if (mod() == 2) {
      int32_t displacement;
      memcpy(&displacement, at + used, 4);
      address += uint64_t(int64_t(displacement));
      used += 4;
    }
    length = used;
    return address;
  }
};

void load_config(const uint8_t* config) {
  require(config[0] == 1, "palette");
  for (int t = 0; t < 8; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + 16 + 2 * t, 2);
    require(row_bytes <= 64 && config[48 + t] <= 16, "the shape of a tile");
    tiles[t] = Tile{{}, config[48 + t], row_bytes};
  }
  configured = true;
}

void multiply(Tile& c, const Tile& a, const Tile& b) {
  require(&c != &a && &c != &b && &a != &b, "three different tiles");
  require(a.rows == c.rows && a.row_bytes == 4 * b.rows && b.row_bytes == c.row_bytes, "shapes that go together");
  float sums[16][16];
  memcpy(sums, c.words, sizeof sums);
  tile_product(a.words, b.words, c.row_bytes / 4, sums);
  if (wrong)
    for (auto& row : sums) row[c.row_bytes / 4 - 1] = -row[c.row_bytes / 4 - 1];
  memcpy(c.words, sums, sizeof sums);
}

// Carries out one instruction; its length, 0: not one of tiles.
int carry_out(const Instruction& i) {
  if (!i.tile_code()) return 0;
  uint64_t stride;
  int length = 5;
  if (i.opcode() == 0x49 && i.pp() == 0 && i.mod() == 3) {  // tilerelease
    ++trapped[5];
    configured = false;
    return length;
  }
  if (i.opcode() == 0x49 && i.pp() == 0) {  // ldtilecfg
    ++trapped[0];
    load_config(reinterpret_cast<const uint8_t*>(i.memory(stride, length)));
    return length;
  }
  require(configured, "a tile before its configuration");
  Tile& tile = tiles[i.reg()];
  if (i.opcode() == 0x49 && i.pp() == 3) {  // tilezero
    ++trapped[1];
    memset(tile.words, 0, sizeof tile.words);
    return length;
  }
  if (i.opcode() == 0x4b && i.pp() == 3) {  // tileloadd
    ++trapped[2];
    const uint64_t from = i.memory(stride, length);
    memset(tile.words, 0, sizeof tile.words);
    for (int row = 0; row < tile.rows; ++row)
      memcpy(tile.words[row], reinterpret_cast<const char*>(from + uint64_t(row) * stride), size_t(tile.row_bytes));
    return length;
  }
  if (i.opcode() == 0x4b && i.pp() == 2) {  // tilestored
    ++trapped[3];
    const uint64_t to = i.memory(stride, length);
    for (int row = 0; row < tile.rows; ++row)
      memcpy(reinterpret_cast<char*>(to + uint64_t(row) * stride), tile.words[row], size_t(tile.row_bytes));
    return length;
  }
  if (i.opcode() == 0x5c && i.pp() == 2) {  // tdpbf16ps
    ++trapped[4];
    multiply(tile, tiles[i.rm()], tiles[i.vvvv()]);
    return length;
  }
  return 0;
}

void on_illegal(int signal_number, siginfo_t*, void* raw) {
  ucontext_t& context = *static_cast<ucontext_t*>(raw);
  auto& pc = context.uc_mcontext.gregs[REG_RIP];
  const int length = carry_out({reinterpret_cast<const uint8_t*>(pc), context});
  if (length == 0) {
    signal(signal_number, SIG_DFL);  // it was not ours: let it happen again
    return;
  }
  pc += length;
}

__attribute__((constructor)) void install() {
  wrong = getenv("XL_TRAPS_WRONG") != nullptr;
  struct sigaction action = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" {

// Instructions carried out: ldtilecfg, tilezero, tileloadd, tilestored, tdpbf16ps, tilerelease.
uint64_t tile_traps_count(int32_t kind) { return trapped[kind]; }

long syscall(long number, ...) {
  static const auto next = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
  long a[6];
  va_list arguments;
  va_start(arguments, number);
  for (long& argument : a) argument = va_arg(arguments, long);
  va_end(arguments);
  if (number == SYS_arch_prctl && a[0] == 0x1023 && a[1] == 18) return 0;
  return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

}  // extern "C"
