#include "../../kernels/common/device.cuh"

#include <cxxabi.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool landed;
};

// A product of a warpgroup, this thread's share of it.
struct GroupProduct {
  float* d;
  const unsigned char *a, *b;
  int panel_bytes, columns;
  float (*value)(uint16_t);
  bool done;
};

enum class State { kReady, kAtBarrier, kInCluster, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  State state = State::kReady;
  size_t first = 0, count = 0;  // the fibers that meet at the barrier where this one waits
  size_t base = 0;              // the first fiber of its block
  size_t arrived = 0;           // how often, in its cluster
  unsigned char* smem = nullptr;
  Position position;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
  std::vector<std::vector<GroupProduct>> products;  // as groups, oldest first
  std::vector<GroupProduct> open_products;
  const char* operation = nullptr;
  void* argument = nullptr;
};

// Blocks that run side by side: one, or those of a cluster, whose fibers follow each other.
struct Scheduler {
  std::mt19937_64 random{1};
  std::set<std::string> ran;
  std::string kernel;
  std::vector<Fiber> fibers;
  ucontext_t home;
  const void* home_stack = nullptr;
  size_t home_stack_bytes = 0;
  void* home_fake_stack = nullptr;
  Fiber* current = nullptr;
  void (*run)(void*, unsigned char*) = nullptr;
  void* run_context = nullptr;
  size_t threads = 0;  // of a block
  size_t smem_bytes = 0;
};
Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

void leave_fiber(bool for_good) {
  Scheduler& s = scheduler();
  Fiber& self = *s.current;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, s.home_stack, s.home_stack_bytes);
#endif
  swapcontext(&self.context, &s.home);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void enter_fiber(Fiber& fiber) {
  Scheduler& s = scheduler();
  s.current = &fiber;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&s.home_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&s.home, &fiber.context);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(s.home_fake_stack, nullptr, nullptr);
#endif
  s.current = nullptr;
}

void fiber_main() {
  Scheduler& s = scheduler();
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &s.home_stack, &s.home_stack_bytes);
#endif
  s.run(s.run_context, s.current->smem);
  s.current->state = State::kDone;
  leave_fiber(true);
}

void begin(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler().home;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::kReady;
  fiber.arrived = 0;
  fiber.groups.clear();
  fiber.open.clear();
}

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  if (copy.from != nullptr)
    memcpy(copy.to, copy.from, copy.bytes);
  else
    memset(copy.to, 0, copy.bytes);
}

// Lets threads go on that wait for their cluster, if all have arrived; false: there are none.
bool release_cluster() {
  Scheduler& s = scheduler();
  size_t least = s.fibers.front().arrived;
  for (const Fiber& fiber : s.fibers) least = fiber.arrived < least ? fiber.arrived : least;
  bool any = false;
  for (Fiber& fiber : s.fibers) {
    if (fiber.state != State::kInCluster || fiber.arrived > least) continue;
    fiber.state = State::kReady;
    any = true;
  }
  return any;
}

// Lets the threads of one barrier past it, any of those at which all of its threads are; false: there is none.
bool release_barrier() {
  Scheduler& s = scheduler();
  std::vector<const Fiber*> whole;
  for (size_t thread = 0; thread < s.fibers.size(); ++thread) {
    const Fiber& fiber = s.fibers[thread];
    if (fiber.state != State::kAtBarrier || fiber.first != thread) continue;
    if (fiber.first + fiber.count > s.fibers.size()) fail("a barrier of more threads than there are");
    bool all = true;
    for (size_t i = fiber.first; i < fiber.first + fiber.count; ++i) {
      const Fiber& other = s.fibers[i];
      if (other.state == State::kDone) fail("a thread ended while others wait at a barrier");
      all &= other.state == State::kAtBarrier && other.first == fiber.first && other.count == fiber.count;
    }
    if (all) whole.push_back(&fiber);
  }
  if (whole.empty()) return release_cluster();
  const Fiber& one = *whole[s.random() % whole.size()];
  const size_t first = one.first, end = one.first + one.count;
  for (size_t i = first; i < end; ++i) s.fibers[i].state = State::kReady;
  return true;
}

void run_side_by_side() {
  Scheduler& s = scheduler();
  const int threads = static_cast<int>(s.fibers.size());
  std::vector<int> ready, later;
  // From barrier to barrier, either all warps go on side by side, or some, or some blocks of a cluster, wait until the
  // others can go no further: a value that is overwritten too early, or is no longer there, is seen then.
  uint64_t waiting = 0;
  int together = 32;  // threads that wait together
  const auto draw_waiting = [&] {
    waiting = s.random() % 2 != 0 ? s.random() : 0;
    together = threads > static_cast<int>(s.threads) && s.random() % 4 != 0 ? static_cast<int>(s.threads) : 32;
  };
  draw_waiting();
  for (;;) {
    ready.clear();
    later.clear();
    bool all_done = true;
    for (int i = 0; i < threads; ++i) {
      if (s.fibers[static_cast<size_t>(i)].state == State::kReady)
        ((waiting >> (i / together % 64) & 1) != 0 ? later : ready).push_back(i);
      all_done &= s.fibers[static_cast<size_t>(i)].state == State::kDone;
    }
    if (all_done) return;
    if (ready.empty() && !later.empty() && release_barrier()) continue;  // on without those that wait
    if (ready.empty()) ready.swap(later);
    if (ready.empty()) {
      if (!release_barrier()) fail("threads wait for each other at different places");
      draw_waiting();
      continue;
    }
    // Everyone that can run runs once before the next look: cheap, and the order is still random.
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[s.random() % i]);
    for (int i : ready)
      if (s.fibers[static_cast<size_t>(i)].state == State::kReady) enter_fiber(s.fibers[static_cast<size_t>(i)]);
  }
}

}  // namespace

void set_seed(uint64_t seed) { scheduler().random.seed(seed); }

std::string kernels_that_ran() {
  std::string text;
  for (const std::string& name : scheduler().ran) text += name + "\n";
  return text;
}

const Position& position() { return scheduler().current->position; }

void fail(const std::string& what) {
  const Scheduler& s = scheduler();
  fprintf(stderr, "simt: %s: %s", s.kernel.c_str(), what.c_str());
  if (s.current != nullptr)
    fprintf(stderr, " (thread %d of block %ld, %ld, %ld)", s.current->position.thread,
            static_cast<long>(s.current->position.block[0]), static_cast<long>(s.current->position.block[1]),
            static_cast<long>(s.current->position.block[2]));
  fprintf(stderr, "\n");
  fflush(stderr);
  _Exit(3);
}

void barrier() { barrier_of(0, static_cast<int>(scheduler().threads)); }

void arrive_in_cluster() { ++scheduler().current->arrived; }

void wait_for_cluster() {
  scheduler().current->state = State::kInCluster;
  leave_fiber(false);
}

const void* in_block(const void* own, size_t bytes, int block) {
  Scheduler& s = scheduler();
  const Fiber& self = *s.current;
  const size_t other = static_cast<size_t>(block) * s.threads;
  if (block < 0 || other >= s.fibers.size()) fail("there is no such block in the cluster");
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(own) - self.smem);
  if (offset % 16 != 0 || offset + bytes > s.smem_bytes) fail("a load of what is not shared memory, or not aligned");
  for (size_t i = other; i < other + s.threads; ++i)
    if (s.fibers[i].state == State::kDone) fail("a load from a block of the cluster one of whose threads has ended");
  return s.fibers[other].smem + offset;
}

void barrier_of(int first, int count) {
  Fiber& self = *scheduler().current;
  if (self.position.thread < first || self.position.thread >= first + count) fail("a thread at a barrier of others");
  self.state = State::kAtBarrier;
  self.first = self.base + static_cast<size_t>(first);
  self.count = static_cast<size_t>(count);
  leave_fiber(false);
}

void warp_together(const char* name, void* argument, void (*all)(void* const (&arguments)[32])) {
  Scheduler& s = scheduler();
  Fiber& self = *s.current;
  self.operation = name;
  self.argument = argument;
  self.state = State::kInWarp;
  Fiber* warp = &s.fibers[self.base + static_cast<size_t>(self.position.thread / 32 * 32)];
  void* arguments[32];
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (warp[lane].state == State::kDone) fail(std::string("a lane ended before ") + name);
    if (warp[lane].state != State::kInWarp) {
      complete = false;
      break;
    }
    if (strcmp(warp[lane].operation, name) != 0)
      fail(std::string("one lane is at ") + name + ", another at " + warp[lane].operation);
    arguments[lane] = warp[lane].argument;
  }
  if (!complete) {
    leave_fiber(false);
    return;
  }
  all(arguments);
  for (int lane = 0; lane < 32; ++lane) warp[lane].state = State::kReady;
}

void copy_later(void* to, const void* from, size_t bytes) {
  Scheduler& s = scheduler();
  Copy copy{to, from, bytes, false};
  if (s.random() % 2 != 0) land(copy);
  s.current->open.push_back(copy);
}

void commit_copies() {
  Fiber& self = *scheduler().current;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void wait_copies(int pending) {
  Fiber& self = *scheduler().current;
  while (self.groups.size() > static_cast<size_t>(pending)) {
    for (Copy& copy : self.groups.front()) land(copy);
    self.groups.erase(self.groups.begin());
  }
}

namespace {

// The value at a byte of a panel, whose cells of 16 bytes are exchanged by bits 7 to 9 of their address.
float panel_value(const unsigned char* at, float (*value)(uint16_t)) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  uint16_t bits;
  memcpy(&bits, reinterpret_cast<const void*>(address ^ (address >> 7 & 7) << 4), 2);
  return value(bits);
}

void multiply_group(GroupProduct& mine, int thread) {
  if (mine.done) return;
  mine.done = true;
  const int lane = thread % 32, warp = thread / 32 % 4;
  for (int half = 0; half < 2; ++half) {
    float a[16];
    for (int k = 0; k < 16; ++k)
      a[k] = panel_value(mine.a + (warp * 16 + half * 8 + lane / 4) * 128 + k * 2, mine.value);
    for (int i = 0; i < mine.columns / 4; ++i) {
      const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
      float& d = mine.d[i / 2 * 4 + half * 2 + i % 2];
      double sum = static_cast<double>(d);
      for (int k = 0; k < 16; ++k) {
        const unsigned char* b = mine.b + column / 64 * mine.panel_bytes + k * 128 + column % 64 * 2;
        sum += static_cast<double>(a[k]) * static_cast<double>(panel_value(b, mine.value));
      }
      d = static_cast<float>(sum);
    }
  }
}

}  // namespace

void multiply_later(float* d, const unsigned char* a, const unsigned char* b, int panel_bytes, int columns,
                    float (*value)(uint16_t)) {
  Scheduler& s = scheduler();
  Fiber& self = *s.current;
  if (reinterpret_cast<uintptr_t>(a) % 16 != 0 || reinterpret_cast<uintptr_t>(b) % 1024 % 128 != 0)
    fail("wgmma: operands start at a row, moved by cells of 16 bytes");
  bool first = true;  // products on one accumulator run in order
  for (const auto& group : self.products)
    for (const GroupProduct& p : group) first = first && p.done;
  for (const GroupProduct& p : self.open_products) first = first && p.done;
  self.open_products.push_back(GroupProduct{d, a, b, panel_bytes, columns, value, false});
  if (first && s.random() % 2 != 0) multiply_group(self.open_products.back(), self.position.thread);
}

void commit_products() {
  Fiber& self = *scheduler().current;
  self.products.push_back(std::move(self.open_products));
  self.open_products.clear();
}

void wait_products(int pending) {
  Fiber& self = *scheduler().current;
  while (self.products.size() > static_cast<size_t>(pending)) {
    for (GroupProduct& product : self.products.front()) multiply_group(product, self.position.thread);
    self.products.erase(self.products.begin());
  }
}

void run_blocks(const std::type_info& kernel, int threads, int64_t x, int64_t y, int64_t z, size_t smem_bytes,
                int64_t cluster, void (*run)(void*, unsigned char*), void* context) {
  Scheduler& s = scheduler();
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(kernel.name(), nullptr, nullptr, &status),
                                                    free);
  s.kernel = name.get();
  if (threads % 32 != 0) fail("threads must be a multiple of 32");
  if (y > 65535 || z > 65535) fail("a grid is at most 65535 in y and z");
  if (cluster < 1 || cluster > 8 || z % cluster != 0) fail("a cluster is 1 to 8 blocks, by which z can be divided");
  s.ran.insert(s.kernel);
  s.threads = static_cast<size_t>(threads);
  s.smem_bytes = smem_bytes;
  const size_t together = s.threads * static_cast<size_t>(cluster);
  if (s.fibers.size() < together) s.fibers = std::vector<Fiber>(together);
  s.fibers.resize(together);
  s.run = run;
  s.run_context = context;

  std::vector<int64_t> order(static_cast<size_t>(x * y * z / cluster));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[s.random() % i]);
  const size_t memory = (smem_bytes + 1023) / 1024 * 1024 + 1024;
  for (int64_t first : order) {
    std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> held;
    for (int64_t block = 0; block < cluster; ++block) {
      held.emplace_back(static_cast<unsigned char*>(aligned_alloc(1024, memory)), free);
      // Exactly the bytes asked for: what lies behind them is not the kernel's.
      unsigned char* smem = held.back().get();
      memset(smem, 0xff, smem_bytes);
#ifdef SIMT_ASAN
      __asan_poison_memory_region(smem + smem_bytes, memory - smem_bytes);
#endif
      for (int i = 0; i < threads; ++i) {
        const size_t base = static_cast<size_t>(block) * s.threads;
        Fiber& fiber = s.fibers[base + static_cast<size_t>(i)];
        begin(fiber);
        fiber.base = base;
        fiber.smem = smem;
        fiber.position = Position{i, {first % x, first / x % y, first / x / y * cluster + block}};
      }
    }
    run_side_by_side();
    for (Fiber& fiber : s.fibers)
      for (const std::vector<Copy>& group : fiber.groups)
        if (!group.empty()) fail("a thread ended with asynchronous copies under way");
#ifdef SIMT_ASAN
    for (const auto& smem : held) __asan_unpoison_memory_region(smem.get(), memory);
#endif
  }
}

}  // namespace simt
