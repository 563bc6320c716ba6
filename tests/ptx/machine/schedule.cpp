// Clusters, warps and their lanes: who runs, and who waits for whom.
#include <algorithm>

#include "machine.h"

namespace ptx {

using std::string;

Machine::Machine(const Program& program, const Kernel& kernel, PtxLaunch& launch)
    : program_(program),
      kernel_(kernel),
      launch_(launch),
      options_(launch.options),
      counters_(launch.counters),
      num_threads_(launch.block[0] * launch.block[1] * launch.block[2]),
      num_warps_((num_threads_ + kLanes - 1) / kLanes) {
  for (u32 i = 0; i < launch.num_regions; ++i) {
    const PtxRegion& r = launch.regions[i];
    regions_.emplace_back(r.begin, r.bytes, r.written);
  }
  for (const auto& [name, global] : program.globals) regions_.emplace_back(global.address, global.bytes, nullptr);
  std::sort(regions_.begin(), regions_.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
}

void Machine::run() {
  const u32 blocks = launch_.grid[0] * launch_.grid[1] * launch_.grid[2], size = std::max(1u, launch_.cluster);
  if (blocks % size) throw Error("the grid is not a multiple of the cluster");
  random_ = 0x9e3779b97f4a7c15u * (u64)(options_.seed + 1);
  for (u32 first = 0; first < blocks; first += size) run_cluster(first, size);
  for (const Region& r : regions_) {
    for (const u8 x : r.loaded) counters_[kPtxUniqueLoadSectors] += x;
    for (const u8 x : r.stored) counters_[kPtxUniqueStoreSectors] += x;
  }
}

void Machine::start(u32 first_block, u32 size) {
  ++cluster_;
  blocks_.assign(size, {}), warps_.assign(size * num_warps_, {});
  mbarriers_.clear(), copies_.clear(), seen_clusters_.clear();
  cluster_phase_ = cluster_arrivals_ = 0;
  cluster_released_ = {};
  const u32 bytes = program_.shared_bytes + launch_.dynamic_shared;
  for (u32 rank = 0; rank < size; ++rank) {
    Block& block = blocks_[rank];
    block.id = first_block + rank;
    block.shared.assign(bytes, 0xff), block.written.assign(bytes, 0);  // NaN
    if (options_.races) block.shadow.assign(bytes, {});
    for (u32 n = 0; n < num_warps_; ++n) {
      Warp& w = warps_[rank * num_warps_ + n];
      w.index = rank * num_warps_ + n, w.block = rank;
      w.alive = (u32)low_bits(std::min<u32>(kLanes, num_threads_ - kLanes * n));
      w.registers.assign((size_t)kernel_.num_registers * kLanes, ~0ull), w.predicates.assign(kernel_.num_predicates, 0);
      for (const auto& [name, slot] : kernel_.special)
        for (u32 lane = 0; lane < kLanes; ++lane)
          w.registers[slot * kLanes + lane] = special(name, block.id, kLanes * n + lane, rank, size);
    }
  }
}

u32 Machine::special(const string& name, u32 block, u32 thread, u32 rank, u32 size) const {
  const auto coordinate = [&](const string& prefix, u32 index, const uint32_t* extent, u32& value) {
    if (name.compare(0, prefix.size(), prefix) != 0 || name.size() != prefix.size() + 1) return false;
    const char axis = name.back();
    value = axis == 'x'   ? index % extent[0]
            : axis == 'y' ? index / extent[0] % extent[1]
                          : index / extent[0] / extent[1];
    return axis >= 'x' && axis <= 'z';
  };
  u32 value;
  if (coordinate("%tid.", thread, launch_.block, value) || coordinate("%ctaid.", block, launch_.grid, value))
    return value;
  for (int axis = 0; axis < 3; ++axis) {
    if (name == string("%ntid.") + "xyz"[axis]) return launch_.block[axis];
    if (name == string("%nctaid.") + "xyz"[axis]) return launch_.grid[axis];
  }
  if (name == "%laneid") return thread % kLanes;
  if (name == "%cluster_ctarank") return rank;
  if (name == "%cluster_nctarank") return size;
  throw Error("PTX that the machine does not know: special register " + name);
}

void Machine::run_cluster(u32 first_block, u32 size) {
  start(first_block, size);
  std::vector<u32> turns(warps_.size());
  for (u32 i = 0; i < turns.size(); ++i) turns[i] = i;
  constexpr int kPatience = 3;  // rounds, in which waiting for a copy makes it arrive
  for (int idle = 0; idle <= kPatience;) {
    progress_ = false;
    if (options_.seed)
      for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[random() % i]);
    bool alive = false;
    for (const u32 turn : turns) {
      Warp& w = warps_[turn];
      alive |= w.alive != 0;
      if (!w.alive || w.at_barrier) continue;
      if (w.at_cluster_barrier) {
        if (cluster_phase_ <= w.cluster_phase) continue;
        w.at_cluster_barrier = false;
        w.clock.join(cluster_released_);
      }
      take_turn(w);
    }
    for (u32 rank = 0; rank < size; ++rank) release(rank);
    if (!alive) {
      if (!copies_.empty()) throw Error(kernel_.name + " ends while a bulk copy is on its way");
      return;
    }
    idle = progress_ ? 0 : idle + 1;
  }
  throw Error("deadlock in " + kernel_.name + stuck());
}

string Machine::stuck() const {
  string result;
  for (const Warp& w : warps_)
    if (w.alive && result.size() < 600)
      result += "; warp " + std::to_string(w.index) + " at " +
                kernel_.code[w.at_barrier ? w.barrier : w.place[std::countr_zero(w.alive)]].text;
  return result;
}

// ------------------------------------------------------------------------------------------------------------- a warp

bool Machine::choose(Warp& w) {
  const u32 ready = w.alive & ~w.waiting;
  w.here = w.next = ~0u, w.active = 0;
  each(ready, [&](int lane) {
    const u32 at = w.place[lane];
    if (at < w.here)
      w.next = w.here, w.here = at, w.active = 1u << lane;
    else if (at == w.here)
      w.active |= 1u << lane;
    else
      w.next = std::min(w.next, at);
  });
  return ready != 0;
}

void Machine::leave(Warp& w) const {
  each(w.active, [&](int lane) { w.place[lane] = w.here; });
}

// Where all `members` must come together. True if they have: then they are the active lanes.
bool Machine::gather(Warp& w, u32 members) {
  members &= w.alive;
  if (w.active == members) return true;
  u32 here = w.active;
  each(w.waiting, [&](int lane) {
    if (w.place[lane] == w.here) here |= 1u << lane;
  });
  leave(w);
  if ((here & members) != members) {
    w.waiting |= w.active;
    return false;
  }
  if (w.active & ~members) w.next = std::min(w.next, w.here);
  w.waiting &= ~members, w.active = members;
  return true;
}

// True if the warp may go on with other lanes.
bool Machine::arrive_at_barrier(Warp& w) {
  if (!gather(w, w.alive)) return true;
  w.barrier = w.here++;
  leave(w);
  w.at_barrier = progress_ = true;
  return false;
}

void Machine::jump(Warp& w, const Instruction& i, u32 mask) {
  if (mask == w.active) {
    w.here = i.target;
    if (w.next != ~0u) leave(w), choose(w);
    return;
  }
  ++w.here;
  if (mask == 0) return;
  ++counters_[kPtxDivergentBranches];
  leave(w);
  each(mask, [&](int lane) { w.place[lane] = i.target; });
  choose(w);
}

void Machine::jump_by_table(Warp& w, const Instruction& i, u32 mask) {
  const u64* index = operand(w, i, 0);
  const std::vector<int>& table = kernel_.tables[i.target];
  ++w.here;
  leave(w);
  each(mask, [&](int lane) {
    if ((u32)index[lane] >= table.size()) fail("a jump beyond its table", lane);
    w.place[lane] = table[(u32)index[lane]];
  });
  choose(w);
}

// Instructions of a warp between two places where it waits: no kernel here has a hundredth of them.
constexpr s64 kEndless = 1 << 26;

void Machine::take_turn(Warp& w) {
  running_ = &w;
  s64 steps = options_.seed ? 1 + random() % 64 : kEndless;
  if (!choose(w)) fail_divergent(w);
  for (;; --steps) {
    if (steps == 0) {
      if (!options_.seed) fail("a loop without an end", 0);
      leave(w);
      progress_ = true;
      return;
    }
    if (w.here >= w.next) leave(w), choose(w);
    const Instruction& i = kernel_.code[w.here];
    now_ = &i;
    u32 mask = w.active;
    if (i.guard >= 0) mask &= i.guard_negated ? ~w.predicates[i.guard] : w.predicates[i.guard];
    ++counters_[kPtxInstructions], counters_[kPtxThreadInstructions] += std::popcount(mask);
    if (mask == 0 && i.op != Op::kBra) {
      ++w.here;
      continue;
    }
    bool goes_on = true;  // else: other lanes of the warp may
    switch (i.op) {
      case Op::kBra:
        jump(w, i, mask);
        continue;
      case Op::kBrx:
        jump_by_table(w, i, mask);
        continue;
      case Op::kRet:
        progress_ = true;
        ++w.here;
        leave(w);
        w.alive &= ~mask;
        w.waiting = 0;  // perhaps for these lanes
        cluster_arrived();
        if (!w.alive) return;
        goes_on = false;
        break;
      case Op::kBarSync:
        if (mask != w.active) fail("a barrier under a predicate", 0);
        if (!arrive_at_barrier(w)) return;
        goes_on = false;
        break;
      case Op::kShfl:
      case Op::kRedux:
      case Op::kVote:
      case Op::kBarWarp:
      case Op::kLdmatrix:
      case Op::kStmatrix: {
        if (mask != w.active) fail("an instruction of several lanes under a predicate", 0);
        const bool of_all = i.op == Op::kLdmatrix || i.op == Op::kStmatrix;
        const u32 members = of_all ? ~0u : (u32)operand(w, i, i.num_operands - 1)[std::countr_zero(mask)];
        if (!(members >> std::countr_zero(mask) & 1))
          fail("a lane that is not in its own mask", std::countr_zero(mask));
        goes_on = gather(w, members);
        if (goes_on) together(w, i, w.active), ++w.here;
        break;
      }
      case Op::kClusterArrive:
        w.cluster_phase = cluster_phase_;
        tick(w);
        cluster_released_.join(w.clock);
        cluster_arrivals_ += std::popcount(mask);
        cluster_arrived();
        ++w.here;
        break;
      case Op::kClusterWait:
        ++w.here;
        leave(w);
        progress_ = true;
        if (cluster_phase_ <= w.cluster_phase) {
          w.at_cluster_barrier = true;
          return;
        }
        w.clock.join(cluster_released_);
        break;
      case Op::kMbarrierTryWait: {
        const bool over = try_wait(w, i, mask);
        ++w.here;
        if (!over) {
          leave(w);
          return;
        }
        break;
      }
      default:
        execute(w, i, mask);
        ++w.here;
    }
    if (!goes_on && !choose(w)) fail_divergent(w);
  }
}

void Machine::fail_divergent(Warp& w) {
  std::set<u32> at;
  each(w.alive, [&](int lane) { at.insert(w.place[lane]); });
  string what = "divergent barrier: lanes of a warp wait at different places";
  for (const u32 place : at) what += "; " + kernel_.code[place].text;
  now_ = &kernel_.code[*at.begin()];
  fail(what, std::countr_zero(w.alive));
}

// -------------------------------------------------------------------------------------------------- blocks and
// clusters

// Ends a barrier of a block if all its warps have arrived.
void Machine::release(u32 rank) {
  Warp *const first = &warps_[rank * num_warps_], *const last = first + num_warps_;
  const Warp* one = nullptr;
  for (Warp* w = first; w < last; ++w) {
    if (!w->alive) continue;
    if (!w->at_barrier) return;
    if (one && one->barrier != w->barrier) {
      now_ = &kernel_.code[w->barrier], running_ = w;
      report(kPtxMixedBarriers, "warps of a block meet at different barriers", 0);
    }
    one = w;
  }
  if (!one) return;
  if (options_.races) {
    Clock all;
    for (Warp* w = first; w < last; ++w) tick(*w), all.join(w->clock);
    for (Warp* w = first; w < last; ++w) w->clock.join(all);
  }
  for (Warp* w = first; w < last; ++w) w->at_barrier = false;
  ++counters_[kPtxBarriers];
  progress_ = true;
}

// Ends a barrier of the cluster if all its threads that have not returned have arrived.
void Machine::cluster_arrived() {
  u64 alive = 0;
  for (const Warp& w : warps_) alive += std::popcount(w.alive);
  if (cluster_arrivals_ == 0 || cluster_arrivals_ < alive) return;
  ++cluster_phase_, cluster_arrivals_ = 0;
  ++counters_[kPtxBarriers];
  progress_ = true;
}

// -------------------------------------------------------------------------------------------------------------
// findings

string Machine::where(int lane) const {
  const auto file = program_.files.find(now_->file);
  return " [" + kernel_.name + ", block " + std::to_string(blocks_[running_->block].id) + ", warp " +
         std::to_string(running_->index % num_warps_) + ", lane " + std::to_string(lane) + ", `" +
         now_->text.substr(0, 150) + "`, " + (file == program_.files.end() ? "?" : file->second) + ":" +
         std::to_string(now_->line) + "]";
}

string Machine::name_of(u32 id) const {
  const u32 index = Shadow::index_of(id);
  if (index >= warps_.size()) return "a bulk copy";
  return "warp " + std::to_string(index) + " lane " + std::to_string((id - 1) % kLanes);
}

void Machine::report(PtxCounter kind, const string& what, int lane) {
  if (counters_[kind]++ == 0) findings += what + where(lane) + "\n";
}

}  // namespace ptx
