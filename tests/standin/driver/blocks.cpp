// The threads that play blocks.

#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <ctime>

#include "standin.h"

namespace standin {

namespace {

// What the signal handlers of a block's thread know.
struct Running {
  const char* kernel;
  int block;
  sigjmp_buf leave;
};
thread_local Running* running = nullptr;

struct sigaction others[2];  // for SIGSEGV and SIGBUS of threads that play no block

void on_bad_address(int signal, siginfo_t* info, void* context) {
  if (running) {
    complain("block %d of %s touched %p, which is nobody's memory", running->block, running->kernel, info->si_addr);
    siglongjmp(running->leave, 1);
  }
  const struct sigaction& other = others[signal == SIGBUS];
  if (other.sa_flags & SA_SIGINFO) return other.sa_sigaction(signal, info, context);
  if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) return other.sa_handler(signal);
  ::signal(signal, SIG_DFL);
}

void on_freeze(int) {
  for (;;) pause();
}

void install_handlers() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &others[0]);
    sigaction(SIGBUS, &action, &others[1]);
    struct sigaction freeze = {};
    freeze.sa_handler = on_freeze;
    sigaction(SIGRTMAX - 1, &freeze, nullptr);
  });
}

std::mutex frozen_mutex;
std::vector<pthread_t> block_threads;

// Fault freeze:MS: so long after the first launch every block stands still for ever.
void freeze_later() {
  static std::once_flag once;
  uint64_t milliseconds = 0;
  if (!fault("freeze", &milliseconds)) return;
  std::call_once(once, [milliseconds] {
    std::thread([milliseconds] {
      usleep(useconds_t(milliseconds * 1000));
      std::lock_guard<std::mutex> lock(frozen_mutex);
      for (pthread_t thread : block_threads) pthread_kill(thread, SIGRTMAX - 1);
    }).detach();
  });
}

// Threads that wait for blocks to play. One pool a kernel that runs; free ones are used again.
class Pool {
 public:
  // Calls body(block) for all blocks in ascending order of start, at most `resident` at a time; whether all were well.
  bool run(int blocks, int resident, const std::function<bool(int)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    body_ = &body;
    next_ = 0;
    blocks_ = blocks;
    left_ = blocks;
    good_ = true;
    may_start_ = resident < blocks ? resident : blocks;
    for (int missing = may_start_ - threads_; missing > 0; --missing, ++threads_) std::thread([this] { play(); }).detach();
    start_.notify_all();
    finished_.wait(lock, [this] { return left_ == 0; });
    return good_;
  }

 private:
  void play() {
    {
      std::lock_guard<std::mutex> lock(frozen_mutex);
      block_threads.push_back(pthread_self());
    }
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [this] { return next_ < blocks_ && may_start_ > 0; });
      const int block = next_++;
      --may_start_;
      const std::function<bool(int)>& body = *body_;
      lock.unlock();
      const bool good = body(block);
      lock.lock();
      good_ = good_ && good;
      ++may_start_;
      start_.notify_all();
      if (--left_ == 0) finished_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, finished_;
  const std::function<bool(int)>* body_ = nullptr;
  int threads_ = 0, next_ = 0, blocks_ = 0, left_ = 0, may_start_ = 0;
  bool good_ = true;
};

std::mutex pools_mutex;
std::vector<Pool*> free_pools;

}  // namespace

CUresult run_blocks(const char* name, int blocks, int resident, const std::function<bool(int block)>& body) {
  install_handlers();
  freeze_later();
  if (fault("missing_team") && blocks > 1 && resident >= blocks) resident = blocks - 1;
  Pool* pool = nullptr;
  {
    std::lock_guard<std::mutex> lock(pools_mutex);
    if (!free_pools.empty()) {
      pool = free_pools.back();
      free_pools.pop_back();
    }
  }
  if (!pool) pool = new Pool;
  ++resident_kernels();
  if (fault("stuck")) on_freeze(0);
  const bool good = pool->run(blocks, resident, [&](int block) {
    Running here = {name, block, {}};
    running = &here;
    // No destructor is skipped that matters: a context with this error is lost.
    const bool came_back = sigsetjmp(here.leave, 1) == 0 && body(block);
    running = nullptr;
    return came_back;
  });
  --resident_kernels();
  std::lock_guard<std::mutex> lock(pools_mutex);
  free_pools.push_back(pool);
  return good ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

}  // namespace standin
