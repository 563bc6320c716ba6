// The machine: one launch of a kernel, cluster after cluster, its warps in turns.
#pragma once

#include <bit>
#include <deque>
#include <memory>
#include <set>

#include "program.h"
#include "ptx.h"
#include "races.h"

namespace ptx {

// Generic addresses of shared memory and of parameters; those of global memory are addresses of this process.
// Addresses in the shared memory of a cluster are offsets, with the number of the block, from 1, above; 0 is one's own.
constexpr int kClusterShift = 24;
constexpr u64 kWindow = 0xff00000000000000, kSharedWindow = 0x7e00000000000000, kParamWindow = 0x7d00000000000000;

// Global memory that a kernel may access.
struct Region {
  Region(u64 begin_, u64 bytes, u8* written_);
  u64 begin, end;
  u8* written;
  std::vector<u8> loaded, stored;  // sectors

  Shadow* shadow(u64 address);  // of this byte, and of those behind it up to the next multiple of kChunk

 private:
  static constexpr u64 kChunk = 4096;
  std::vector<std::unique_ptr<Shadow[]>> shadows_;  // of what is accessed
};

struct Block {
  u32 id;
  std::vector<u8> shared, written;
  std::vector<Shadow> shadow;
};

struct Warp {
  u32 index, block;  // in the cluster
  // Lanes: those that have not returned, those that wait for others at an instruction, and those that run.
  u32 alive, waiting = 0, active = 0;
  u32 here = 0, next = ~0u;  // where the active lanes are, and the lowest place of others that can run
  u32 place[kLanes] = {};    // where lanes are that are not active
  bool at_barrier = false, at_cluster_barrier = false;
  u32 barrier = 0;  // the place of its instruction
  u64 cluster_phase = 0;
  std::vector<u64> registers;  // each of 32 lanes
  std::vector<u32> predicates;
  Clock clock;
};

struct Mbarrier {
  s64 count = 0, pending = 0, bytes = 0;
  u32 phase = 0;
  u32 copier = 0, copies = 0;  // its copies are an agent, for they arrive when they like; and its time
  Clock released;
};

struct Copy {
  u64 to, from;
  u32 bytes, block;
  u64 mbarrier;  // block << 32 | address
  u32 agent, time;
};

// What atomic operations on an address have made known.
struct Atomic {
  u32 cluster = 0;
  Clock clock;
  std::set<u32> clusters;
};

struct Place {
  u8 *data, *written;
  Shadow* shadow;
  Region* region;
  const Block* block;  // of shared memory
  u64 offset;
};

class Machine {
 public:
  Machine(const Program&, const Kernel&, PtxLaunch&);
  void run();
  std::string findings;  // what was found and did not end the launch, the first of its kind

 private:
  // --- schedule.cpp
  void run_cluster(u32 first_block, u32 size);
  void start(u32 first_block, u32 size);
  u32 special(const std::string& name, u32 block, u32 thread, u32 rank, u32 size) const;
  void take_turn(Warp&);
  bool choose(Warp&);       // the lanes at the lowest place; false if none can run
  void leave(Warp&) const;  // remembers where the active lanes are
  bool gather(Warp&, u32 members);
  bool arrive_at_barrier(Warp&);
  void release(u32 block);
  void cluster_arrived();
  void jump(Warp&, const Instruction&, u32 mask);
  void jump_by_table(Warp&, const Instruction&, u32 mask);
  [[noreturn]] void fail_divergent(Warp&);
  std::string stuck() const;
  u32 random() { return (u32)((random_ = random_ * 6364136223846793005u + 1442695040888963407u) >> 33); }

  // --- memory.cpp
  Region* region_at(u64 address);
  Place place(const Warp&, Space, u64 address, u32 bytes, bool store, int lane);
  [[noreturn]] void out_of_bounds(u64 address, u32 bytes, bool store, int lane) const;
  void touch(const Warp&, const Place&, u32 bytes, int lane, const u8* stored);  // null: a load
  void load(Warp&, const Instruction&, u32 mask);
  void store(Warp&, const Instruction&, u32 mask);
  void places(const Warp&, const Instruction&, u32 mask, bool store, Place*);
  void count(u32 mask, const Place*, u32 bytes, bool store);
  void atomic(Warp&, const Instruction&, u32 mask);
  void synchronise(Warp&, u64 address);
  Agent agent(const Warp& w, int lane) const { return {w.index, lane, w.clock.of(w.index) + 1, &w.clock}; }
  // What comes later is not covered by what others learn from the warp now.
  void tick(Warp& w) const { w.clock.set(w.index, w.clock.of(w.index) + 1); }

  // --- asynchronous.cpp
  Mbarrier& mbarrier(const Warp&, u64 address, int lane);
  u64 mbarrier_address(const Warp&, const Instruction&, int lane) const;
  void init_mbarrier(Warp&, const Instruction&, u32 mask);
  void expect(Warp&, const Instruction&, u32 mask);
  void bulk_copy(Warp&, const Instruction&, u32 mask);
  void complete(const Copy&);
  void end_phase(Mbarrier&);
  bool try_wait(Warp&, const Instruction&, u32 mask);

  // --- warps.cpp
  void together(Warp&, const Instruction&, u32 mask);
  void shuffle(Warp&, const Instruction&, u32 mask);
  void reduce(Warp&, const Instruction&, u32 mask);
  void vote(Warp&, const Instruction&, u32 mask);
  void matrix(Warp&, const Instruction&);

  // --- arithmetic.cpp, floats.cpp
  void execute(Warp&, const Instruction&, u32 mask);
  void predicates(Warp&, const Instruction&, u32 mask);
  void move(Warp&, const Instruction&, u32 mask);
  void permute(Warp&, const Instruction&, u32 mask);
  template <class T>
  void integers(Warp&, const Instruction&, u32 mask);
  void convert(Warp&, const Instruction&, u32 mask);
  template <class T>
  void floats(Warp&, const Instruction&, u32 mask);
  void pairs(Warp&, const Instruction&, u32 mask);
  void mixed(Warp&, const Instruction&, u32 mask);
  void halves(Warp&, const Instruction&, u32 mask);
  void compare(Warp&, const Instruction&, u32 mask, u32 result);
  float approximate(double exact, u64 operand) const;

  // --- registers
  const u64* operand(const Warp& w, const Instruction& i, int n) const { return value(w, i.operands[n]); }
  const u64* value(const Warp& w, int operand) const {
    return operand >= 0 ? &w.registers[(size_t)operand * kLanes] : &kernel_.constants[(size_t)~operand * kLanes];
  }
  u64* result(Warp& w, const Instruction& i, int n = 0) {
    return i.results[n] == kNoOperand ? nowhere_ : &w.registers[(size_t)i.results[n] * kLanes];
  }
  static u32 source(const Warp& w, const Instruction& i) {
    return i.source_negated ? ~w.predicates[i.source] : w.predicates[i.source];
  }
  static void set_predicate(Warp& w, int predicate, u32 mask, u32 value) {
    if (predicate >= 0) w.predicates[predicate] = (w.predicates[predicate] & ~mask) | (value & mask);
  }
  template <class F>
  static void each(u32 mask, F f) {
    if (mask == ~0u)
      for (int lane = 0; lane < kLanes; ++lane) f(lane);
    else
      for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
  }

  [[noreturn]] void fail(const std::string& what, int lane) const { throw Error(what + where(lane)); }
  [[noreturn]] void unknown() const { fail("not implemented for this type", 0); }
  void report(PtxCounter, const std::string& what, int lane);
  std::string where(int lane) const;
  std::string name_of(u32 agent_id) const;

  const Program& program_;
  const Kernel& kernel_;
  PtxLaunch& launch_;
  const PtxOptions& options_;
  uint64_t* counters_;
  const u32 num_threads_, num_warps_;

  std::deque<Region> regions_;  // by address
  Region* last_region_ = nullptr;

  u32 cluster_ = 0;  // number, from 1
  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::map<u64, Mbarrier> mbarriers_;  // by block << 32 | address
  std::vector<Copy> copies_;           // on their way
  std::map<u64, Atomic> atomics_;      // by address
  std::set<u32> seen_clusters_;        // of which atomic operations have told this one
  u64 cluster_phase_ = 0, cluster_arrivals_ = 0;
  Clock cluster_released_;

  bool progress_ = false;
  u64 random_ = 0;
  const Instruction* now_ = nullptr;
  const Warp* running_ = nullptr;
  u64 nowhere_[kLanes];
};

}  // namespace ptx
