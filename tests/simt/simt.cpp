// The fibers, their scheduler and the checks behind simt.h.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <unordered_map>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Now now;

// ---- switching between stacks

#if defined(__x86_64__)

// Saves what a called function must preserve and goes on with another stack; no system call.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;

  void start(char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // the return address of `entry`
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) {
    simt_switch(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t saved;

  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = size;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
  }
  static void change(Context& from, Context& to) {
    swapcontext(&from.saved, &to.saved);
  }
};

#endif

#if defined(SIMT_ASAN)
constexpr size_t kStackSize = 256 << 10;
#else
constexpr size_t kStackSize = 64 << 10;
#endif
constexpr size_t kGuard = 4096;

// A stack above a page that nobody may touch.
class Stack {
 public:
  Stack() {
    void* p = mmap(
        nullptr, kStackSize + kGuard, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      throw std::bad_alloc();
    }
    mprotect(p, kGuard, PROT_NONE);
    begin_ = static_cast<char*>(p);
  }
  ~Stack() {
    munmap(begin_, kStackSize + kGuard);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* begin() const {
    return begin_ + kGuard;
  }

 private:
  char* begin_;
};

// ---- what is known of memory

constexpr int kLanes = 32;

// The last accesses of one element, each packed: which thread, between which barriers, where.
struct Cell {
  uint64_t write = 0;
  uint64_t atomic = 0;
  uint64_t reads[2] = {};  // the first and the last
};

// 0 is no access: places count from 1.
struct Packed {
  uint32_t place, block, thread, block_phase, grid_phase, warp_phase;
};
constexpr int kBits[] = {10, 20, 10, 10, 6, 8};

constexpr uint64_t low_bits(uint64_t v, int bits) {
  return v & ((uint64_t{1} << bits) - 1);
}

uint64_t pack(const Packed& p) {
  uint64_t r = 0;
  int at = 0;
  const uint32_t fields[] = {p.place, p.block, p.thread, p.block_phase, p.grid_phase, p.warp_phase};
  for (int i = 0; i < 6; ++i) {
    r |= low_bits(fields[i], kBits[i]) << at;
    at += kBits[i];
  }
  return r;
}

Packed unpack(uint64_t v) {
  uint32_t fields[6];
  for (int i = 0; i < 6; ++i) {
    fields[i] = static_cast<uint32_t>(low_bits(v, kBits[i]));
    v >>= kBits[i];
  }
  return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
}

// By index; of very many only those that were asked for exist.
template <typename T>
class Table {
 public:
  void reset(size_t size) {
    few_ = size <= size_t{1} << 22;
    dense_.assign(few_ ? size : 0, T());
    sparse_.clear();
  }
  T get(size_t i) const {
    if (few_) {
      return dense_[i];
    }
    const auto found = sparse_.find(i);
    return found == sparse_.end() ? T() : found->second;
  }
  void set(size_t i, T v) {
    if (few_) {
      dense_[i] = v;
    } else {
      sparse_[i] = v;
    }
  }

 private:
  bool few_ = true;
  std::vector<T> dense_;
  std::unordered_map<size_t, T> sparse_;
};

struct Region {
  std::string name;
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  size_t element = 1;
  bool shared = false;
  bool used = false;  // in this launch
  Table<Cell> cells;
  Table<bool> read, written;  // by sectors
  Traffic traffic;
};

constexpr size_t kSector = 32;

// ---- threads

struct Block;
struct Warp;

struct Fiber {
  Context context;
  std::unique_ptr<Stack> stack = std::make_unique<Stack>();
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  uint32_t linear = 0;
  int lane = 0;
  Wait waits = Wait::kDone;
  Place place{};
  uint64_t value = 0;
  uint64_t result = 0;
  uint32_t mask = 0;
  int source = 0;
  // phases of the lanes of its warp that come before what this one does now, and its own
  uint8_t phases[kLanes] = {};
  void* fake_stack = nullptr;
};

struct Warp {
  Fiber* lanes[kLanes] = {};
};

struct Block {
  uint3 index{};
  uint32_t linear = 0;
  uint32_t phase = 0;
  std::vector<Fiber*> threads;
  std::vector<Warp> warps;
  std::map<std::string, std::unique_ptr<Region>> statics;
  Region dynamic;
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  size_t static_bytes = 0;
};

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
};

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string text(Place place) {
  const char* slash = strrchr(place.file, '/');
  return std::string(slash == nullptr ? place.file : slash + 1) + ":" + std::to_string(place.line);
}

uint3 unravel(size_t linear, dim3 of) {
  return {
      static_cast<unsigned>(linear % of.x), static_cast<unsigned>(linear / of.x % of.y),
      static_cast<unsigned>(linear / of.x / of.y)};
}

size_t volume(dim3 d) {
  return static_cast<size_t>(d.x) * d.y * d.z;
}

bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

struct Device::State {
  Random random;
  std::vector<std::unique_ptr<Region>> buffers;
  size_t last_buffer = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Place> places{{"", 0}};
  std::unordered_map<uint64_t, uint32_t> place_ids;
  Shape shape{};
  const std::function<void()>* kernel = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  Fiber* running = nullptr;
  std::string error;
  uint32_t grid_phase = 0;
  int idle_rounds = 0;
  size_t ends = 0;            // of a grid, what runs at either end; 0: all
  std::vector<size_t> order;  // the blocks that run, by their places in the grid

  uint32_t id_of(Place place) {
    const uint64_t key =
        reinterpret_cast<uintptr_t>(place.file) * 8191 + static_cast<uint64_t>(place.line);
    const auto found = place_ids.find(key);
    if (found != place_ids.end()) {
      return found->second;
    }
    places.push_back(place);
    return place_ids[key] = static_cast<uint32_t>(places.size() - 1);
  }

  // ---- checks

  std::string who(uint64_t access) const {
    const Packed p = unpack(access);
    return "thread " + text(unravel(p.thread, shape.block)) + " of block " +
           text(unravel(order[p.block], shape.grid)) + " at " + text(places[p.place]);
  }

  bool ordered(const Packed& before, const Packed& now_, bool shared) const {
    if (before.block != now_.block) {
      return shared || before.grid_phase != now_.grid_phase;  // shared: left by an earlier block
    }
    if (before.thread == now_.thread || before.block_phase != now_.block_phase) {
      return true;
    }
    if (before.thread / kLanes != now_.thread / kLanes) {
      return false;
    }
    return running->phases[before.thread % kLanes] >= before.warp_phase;
  }

  void check_cell(Region& r, size_t i, Access access, uint64_t packed) {
    static const char* const kNames[] = {"reads", "writes", "changes (atomically)"};
    Cell cell = r.cells.get(i);
    const Packed mine = unpack(packed);
    const auto clash = [&](uint64_t other, const char* other_name) {
      if (other != 0 && !ordered(unpack(other), mine, r.shared)) {
        throw Error(
            "race on " + r.name + "[" + std::to_string(i) + "]: " + who(other) + " " + other_name +
            ", " + who(packed) + " " + kNames[static_cast<int>(access)] +
            ", with no barrier between them");
      }
    };
    clash(cell.write, "writes");
    if (access != Access::kAtomic) {
      clash(cell.atomic, "changes (atomically)");
    }
    if (access != Access::kRead) {
      clash(cell.reads[0], "reads");
      clash(cell.reads[1], "reads");
    }
    if (r.shared && access != Access::kWrite) {
      const auto mine_too = [&](uint64_t v) { return v != 0 && unpack(v).block == mine.block; };
      if (!mine_too(cell.write) && !mine_too(cell.atomic)) {
        throw Error(
            "unwritten: " + who(packed) + " reads " + r.name + "[" + std::to_string(i) +
            "], which no thread of its block wrote");
      }
    }
    switch (access) {
      case Access::kWrite:
        cell = {packed, 0, {0, 0}};
        break;
      case Access::kAtomic:
        cell.atomic = packed;
        break;
      case Access::kRead:
        if (cell.reads[0] == 0 || ordered(unpack(cell.reads[0]), mine, r.shared)) {
          cell.reads[0] = packed;
        }
        cell.reads[1] = packed;
        break;
    }
    r.cells.set(i, cell);
  }

  void check(
      Region& r, const void* at, size_t bytes, size_t alignment, Access access, Place place) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    const auto begin = reinterpret_cast<uintptr_t>(r.begin);
    const uint64_t packed = pack(
        {id_of(place), running->block->linear, running->linear, running->block->phase, grid_phase,
         running->phases[running->lane]});
    if (address < begin || address + bytes > begin + r.bytes) {
      throw Error(
          "out of bounds: " + who(packed) + " reaches bytes " +
          std::to_string(static_cast<int64_t>(address - begin)) + " to " +
          std::to_string(static_cast<int64_t>(address + bytes - begin)) + " of " + r.name +
          ", which has " + std::to_string(r.bytes));
    }
    if (address % alignment != 0) {
      throw Error(
          "misaligned: " + who(packed) + " reaches byte " + std::to_string(address - begin) +
          " of " + r.name + ", where an access of " + std::to_string(bytes) +
          " bytes needs a multiple of " + std::to_string(alignment));
    }
    for (size_t i = (address - begin) / r.element;
         i <= (address + bytes - 1 - begin) / r.element && bytes > 0; ++i) {
      check_cell(r, i, access, packed);
    }
    if (r.shared || bytes == 0) {
      return;
    }
    r.traffic.accesses += 1;
    const auto count = [&](Table<bool>& seen, uint64_t& sectors, uint64_t& total) {
      total += bytes;
      const size_t origin = begin / kSector;
      for (size_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s) {
        if (!seen.get(s - origin)) {
          seen.set(s - origin, true);
          ++sectors;
        }
      }
    };
    if (access != Access::kWrite) {
      count(r.read, r.traffic.read_sectors, r.traffic.read_bytes);
    }
    if (access != Access::kRead) {
      count(r.written, r.traffic.written_sectors, r.traffic.written_bytes);
    }
  }

  Region& find(const void* at, size_t bytes, Place place) {
    const auto* p = static_cast<const unsigned char*>(at);
    const auto inside = [&](const Region& r) {
      return p >= r.begin && p < r.begin + std::max<size_t>(r.bytes, 1);
    };
    if (last_buffer < buffers.size() && inside(*buffers[last_buffer])) {
      return *buffers[last_buffer];
    }
    const Region* before = nullptr;
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (inside(*buffers[i])) {
        last_buffer = i;
        return *buffers[i];
      }
      if (buffers[i]->begin <= p && (before == nullptr || before->begin < buffers[i]->begin)) {
        before = buffers[i].get();
      }
    }
    throw Error(
        "out of bounds: thread " + text(running->index) + " of block " +
        text(running->block->index) + " reaches " + std::to_string(bytes) + " bytes at " +
        text(place) + ", outside of every buffer" +
        (before == nullptr
             ? std::string()
             : ", " + std::to_string(p - before->begin) + " bytes from the begin of " +
                   before->name + ", which has " + std::to_string(before->bytes)));
  }

  // ---- scheduling

  void resume(Fiber& f) {
    running = &f;
    now = {f.index, f.block->index, shape.block, shape.grid};
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack->begin(), kStackSize);
#endif
    Context::change(scheduler, f.context);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    running = nullptr;
  }

  void to_scheduler(bool last) {
    Fiber& f = *running;
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(
        last ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_size);
#else
    (void)last;
#endif
    Context::change(f.context, scheduler);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
  }

  static const char* name_of(Wait w) {
    switch (w) {
      case Wait::kBlock:
        return "__syncthreads";
      case Wait::kShuffle:
        return "__shfl_sync";
      case Wait::kBallot:
        return "__ballot_sync";
      case Wait::kWarp:
        return "__syncwarp";
      case Wait::kGrid:
        return "a barrier of the grid";
      case Wait::kPause:
        return "a loop that waits";
      default:
        return "nothing";
    }
  }

  // Who of a block is where, for reports.
  static std::string positions(const Block& b) {
    std::map<std::string, std::pair<int, uint3>> groups;
    for (const Fiber* f : b.threads) {
      const std::string at = f->waits == Wait::kDone
                                 ? "exited"
                                 : std::string("at ") + name_of(f->waits) + " in " + text(f->place);
      auto& group = groups.emplace(at, std::make_pair(0, f->index)).first->second;
      ++group.first;
    }
    std::string s;
    for (const auto& g : groups) {
      s += (s.empty() ? "" : ", ") + std::to_string(g.second.first) + " threads (" +
           text(g.second.second) + (g.second.first > 1 ? " ...) " : ") ") + g.first;
    }
    return s;
  }

  [[noreturn]] static void diverged(const Block& b) {
    throw Error("divergent barrier in block " + text(b.index) + ": " + positions(b));
  }

  static bool waits_in_warp(const Fiber& f) {
    return f.waits == Wait::kShuffle || f.waits == Wait::kBallot || f.waits == Wait::kWarp;
  }

  // Lets the lanes of a warp go on that all have arrived.
  static bool release_warp(Warp& w, const Block& b) {
    bool released = false;
    for (Fiber* f : w.lanes) {
      if (f == nullptr || !waits_in_warp(*f)) {
        continue;
      }
      const uint32_t mask = f->mask;
      if ((mask >> f->lane & 1) == 0) {
        throw Error(
            "divergent barrier in block " + text(b.index) + ": thread " + text(f->index) +
            " is not in the mask of its own " + name_of(f->waits) + " in " + text(f->place));
      }
      std::vector<Fiber*> group;
      bool all = true;
      for (Fiber* g : w.lanes) {
        if (g != nullptr && (mask >> g->lane & 1) != 0 && g->waits != Wait::kDone) {
          all = all && g->waits == f->waits && g->mask == mask && same(g->place, f->place);
          group.push_back(g);
        }
      }
      if (!all) {
        continue;
      }
      release_lanes(group, w, b);
      released = true;
    }
    return released;
  }

  static void release_lanes(const std::vector<Fiber*>& group, Warp& w, const Block& b) {
    const Wait kind = group.front()->waits;
    uint64_t ballot = 0;
    uint8_t phases[kLanes] = {};
    for (Fiber* f : group) {
      ballot |= static_cast<uint64_t>(f->value != 0) << f->lane;
      for (int i = 0; i < kLanes; ++i) {
        phases[i] = std::max(phases[i], f->phases[i]);
      }
    }
    for (Fiber* f : group) {
      if (kind == Wait::kBallot) {
        f->result = ballot;
      } else if (kind == Wait::kShuffle) {
        const Fiber* source = w.lanes[f->source];
        if (source == nullptr || std::find(group.begin(), group.end(), source) == group.end()) {
          throw Error(
              "divergent shuffle in block " + text(b.index) + ": thread " + text(f->index) +
              " reads lane " + std::to_string(f->source) + ", which takes no part, in " +
              text(f->place));
        }
        f->result = source->value;
      } else {
        std::copy(phases, phases + kLanes, f->phases);
        if (f->phases[f->lane] < 255) {
          ++f->phases[f->lane];
        }
      }
    }
    for (Fiber* f : group) {
      f->waits = Wait::kNone;
    }
  }

  static bool release_block(Block& b) {
    size_t waiting = 0, done = 0;
    uint64_t count = 0;
    const Fiber* first = nullptr;
    for (const Fiber* f : b.threads) {
      done += f->waits == Wait::kDone;
      if (f->waits == Wait::kBlock) {
        ++waiting;
        count += f->value;
        if (first == nullptr) {
          first = f;
        }
        if (!same(first->place, f->place)) {
          diverged(b);
        }
      }
    }
    if (waiting == 0 || waiting + done < b.threads.size()) {
      return false;
    }
    if (done > 0) {
      diverged(b);
    }
    ++b.phase;
    for (Fiber* f : b.threads) {
      f->result = count;
      f->waits = Wait::kNone;
      std::fill(f->phases, f->phases + kLanes, static_cast<uint8_t>(0));
      f->phases[f->lane] = 1;
    }
    return true;
  }

  bool release_grid(const std::vector<Block*>& active) {
    for (const Block* b : active) {
      for (const Fiber* f : b->threads) {
        if (f->waits != Wait::kGrid) {
          return false;
        }
      }
    }
    ++grid_phase;
    for (Block* b : active) {
      ++b->phase;
      for (Fiber* f : b->threads) {
        f->waits = Wait::kNone;
      }
    }
    return true;
  }

  void run(const std::vector<Block*>& active) {
    std::vector<Fiber*> order;
    for (;;) {
      order.clear();
      bool paused_only = true, left = false;
      for (Block* b : active) {
        for (Fiber* f : b->threads) {
          left = left || f->waits != Wait::kDone;
          if (f->waits == Wait::kNone || f->waits == Wait::kPause) {
            paused_only = paused_only && f->waits == Wait::kPause;
            order.push_back(f);
          }
        }
      }
      if (!left) {
        return;
      }
      for (size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random.next() % i]);
      }
      for (Fiber* f : order) {
        f->waits = Wait::kNone;
        resume(*f);
        if (!error.empty()) {
          throw Error(error);
        }
      }
      bool released = false;
      for (Block* b : active) {
        for (Warp& w : b->warps) {
          released = release_warp(w, *b) || released;
        }
        released = release_block(*b) || released;
      }
      if (!released && order.empty() && !release_grid(active)) {
        for (const Block* b : active) {
          for (const Fiber* f : b->threads) {
            if (f->waits != Wait::kDone && f->waits != Wait::kGrid) {
              diverged(*b);
            }
          }
        }
        diverged(*active.front());
      }
      idle_rounds = paused_only && !released ? idle_rounds + 1 : 0;
      if (idle_rounds > 10000) {
        throw Error("no progress: " + positions(*active.front()));
      }
    }
  }

  void prepare(Block& b, uint32_t linear, size_t first_fiber, void (*entry)()) {
    const size_t threads = volume(shape.block);
    b.linear = linear;
    b.index = unravel(order[linear], shape.grid);
    b.phase = 0;
    b.static_bytes = 0;
    b.threads.clear();
    b.warps.assign((threads + kLanes - 1) / kLanes, Warp());
    while (fibers.size() < first_fiber + threads) {
      fibers.push_back(std::make_unique<Fiber>());
    }
    for (size_t t = 0; t < threads; ++t) {
      Fiber& f = *fibers[first_fiber + t];
      f.block = &b;
      f.index = unravel(static_cast<uint32_t>(t), shape.block);
      f.linear = static_cast<uint32_t>(t);
      f.lane = static_cast<int>(t % kLanes);
      f.warp = &b.warps[t / kLanes];
      f.warp->lanes[f.lane] = &f;
      f.waits = Wait::kNone;
      std::fill(f.phases, f.phases + kLanes, static_cast<uint8_t>(0));
      f.phases[f.lane] = 1;
      f.fake_stack = nullptr;
#if defined(SIMT_ASAN)
      __asan_unpoison_memory_region(f.stack->begin(), kStackSize);
#endif
      f.context.start(f.stack->begin(), kStackSize, entry);
      b.threads.push_back(&f);
    }
    for (auto& s : b.statics) {
      memset(s.second->begin, 0xFF, s.second->bytes);
      s.second->used = false;
    }
    if (b.dynamic.begin != nullptr) {
      memset(b.dynamic.begin, 0xFF, b.dynamic.bytes);
    }
  }

  // Memory of its own for each array, so that AddressSanitizer has guards around it.
  static void allocate(Block& b, Region& r, std::string name, size_t bytes, size_t element) {
    r.name = std::move(name);
    r.bytes = bytes;
    r.element = element;
    r.shared = true;
    b.memory.emplace_back(new unsigned char[bytes]);
    r.begin = b.memory.back().get();
    memset(r.begin, 0xFF, bytes);
    r.cells.reset(bytes / element);
  }
};

namespace {

Device::State* active_state = nullptr;

void entry() {
  Device::State& s = *active_state;
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
  try {
    (*s.kernel)();
  } catch (const std::exception& e) {
    s.error = e.what();
  }
  s.running->waits = Wait::kDone;
  s.to_scheduler(true);
  std::abort();
}

// Fibers are switched while this holds; launches do not nest.
struct Active {
  explicit Active(Device::State* s) {
    if (active_state != nullptr) {
      throw Error("a launch inside a launch");
    }
    active_state = s;
  }
  ~Active() {
    active_state = nullptr;
  }
};

}  // namespace

Device::Device(uint64_t seed) : state_(new State{}) {
  state_->random.state = seed;
}

Device::~Device() = default;

void Device::buffer(const std::string& name, const void* begin, size_t bytes, size_t element) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->begin = static_cast<unsigned char*>(const_cast<void*>(begin));
  region->bytes = bytes;
  region->element = element;
  for (auto& b : state_->buffers) {
    if (b->name == name) {
      region->traffic = b->traffic;
      b = std::move(region);
      return;
    }
  }
  state_->buffers.push_back(std::move(region));
}

void Device::launch(const Shape& shape, const std::function<void()>& kernel, bool cooperative) {
  State& s = *state_;
  const size_t threads = volume(shape.block), blocks = volume(shape.grid);
  if (threads == 0 || threads > 1024 || shape.block.z > 64) {
    throw Error("launch: a block of " + std::to_string(threads) + " threads");
  }
  const bool some = s.ends > 0 && blocks > 2 * s.ends;
  const size_t running = some ? 2 * s.ends : blocks;
  if (blocks == 0 || shape.grid.x > 0x7FFFFFFFu || shape.grid.y > 65535 || shape.grid.z > 65535 ||
      running >> kBits[1] != 0 || (some && cooperative)) {
    throw Error("launch: a grid of " + std::to_string(blocks) + " blocks");
  }
  if (shape.shared > 232448) {
    throw Error("launch: " + std::to_string(shape.shared) + " bytes of shared memory");
  }
  const Active active(&s);
  s.shape = shape;
  s.kernel = &kernel;
  s.error.clear();
  s.grid_phase = 0;
  s.idle_rounds = 0;
  for (auto& b : s.buffers) {
    b->cells.reset((b->bytes + b->element - 1) / b->element);
    const size_t sectors = b->bytes / kSector + 2;
    b->read.reset(sectors);
    b->written.reset(sectors);
  }
  s.blocks.clear();
  const size_t at_once = cooperative ? blocks : 1;
  std::vector<Block*> together;
  for (size_t i = 0; i < at_once; ++i) {
    s.blocks.push_back(std::make_unique<Block>());
    Block& b = *s.blocks.back();
    if (shape.shared > 0) {
      State::allocate(b, b.dynamic, "dynamic shared memory", shape.shared, 1);
    }
    together.push_back(&b);
  }
  // blocks in any order, as on a device
  s.order.resize(running);
  for (size_t i = 0; i < running; ++i) {
    s.order[i] = i < running / 2 ? i : blocks - running + i;
  }
  for (size_t i = running; i > 1; --i) {
    std::swap(s.order[i - 1], s.order[s.random.next() % i]);
  }
  for (size_t first = 0; first < running; first += at_once) {
    for (size_t i = 0; i < at_once; ++i) {
      s.prepare(*together[i], static_cast<uint32_t>(first + i), i * threads, entry);
    }
    s.run(together);
  }
}

void Device::only_ends(size_t blocks) {
  state_->ends = blocks;
}

std::map<std::string, Traffic> Device::traffic() const {
  std::map<std::string, Traffic> r;
  for (const auto& b : state_->buffers) {
    r[b->name] = b->traffic;
  }
  return r;
}

void Device::reset_traffic() {
  for (auto& b : state_->buffers) {
    b->traffic = {};
  }
}

void touch(
    Region* region, const void* at, size_t bytes, size_t alignment, Access access, Place place) {
  if (region == nullptr) {
    throw Error("an access through an empty pointer at " + text(place));
  }
  active_state->check(*region, at, bytes, alignment, access, place);
}

void touch(const void* at, size_t bytes, size_t alignment, Access access, Place place) {
  Device::State& s = *active_state;
  s.check(s.find(at, bytes, place), at, bytes, alignment, access, place);
}

Region* static_shared(size_t bytes, size_t element, const char* name, Place place) {
  Device::State& s = *active_state;
  Block& b = *s.running->block;
  auto& slot = b.statics[std::string(name) + "@" + text(place)];
  if (slot == nullptr) {
    slot = std::make_unique<Region>();
    Device::State::allocate(b, *slot, name, bytes, element);
  }
  if (!slot->used) {
    slot->used = true;
    b.static_bytes += bytes;
    if (b.static_bytes > 48 << 10) {
      throw Error("static shared memory: " + std::to_string(b.static_bytes) + " bytes");
    }
  }
  return slot.get();
}

Region* dynamic_shared() {
  return &active_state->running->block->dynamic;
}

unsigned char* begin_of(Region* region) {
  return region->begin;
}

uint64_t wait(Wait kind, Place place, uint64_t value, uint32_t mask, int source) {
  Device::State& s = *active_state;
  Fiber& f = *s.running;
  f.waits = kind;
  f.place = place;
  f.value = value;
  f.mask = mask;
  f.source = source;
  s.to_scheduler(false);
  return f.result;
}

int lane() {
  return active_state->running->lane;
}

}  // namespace simt

// ---- 16-bit storage, rounded to nearest, ties to even

float __half2float(__half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, rest = v.bits & 0x7FFFu;
  if (rest >= 0x7C00u) {
    return __uint_as_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  }
  // exponents 112 apart; subnormal numbers too
  const float f = __uint_as_float(rest << 13) * 0x1p112f;
  return __uint_as_float(__float_as_uint(f) | sign);
}

__half __float2half(float v) {
  const uint32_t bits = __float_as_uint(v), rest = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (rest > 0x7F800000u) {
    return {0x7FFF};
  }
  // half's last place at this magnitude, and the multiple of it that the sum rounds to
  const int exponent = std::max(static_cast<int>(rest >> 23) - 127, -14);
  if (exponent > 15) {
    return {static_cast<uint16_t>(sign | 0x7C00u)};
  }
  const auto steps = static_cast<uint32_t>(
      std::nearbyint(std::ldexp(static_cast<double>(__uint_as_float(rest)), 10 - exponent)));
  const uint32_t half = (static_cast<uint32_t>(exponent + 14) << 10) + steps;
  return {static_cast<uint16_t>(sign | std::min(half, 0x7C00u))};
}

__nv_bfloat16 __float2bfloat16(float v) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return {0x7FFF};
  }
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
