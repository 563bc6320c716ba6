// Which accesses of memory are in order: vector clocks, and for every byte who was there last.
#pragma once

#include <algorithm>
#include <vector>

#include "base.h"

namespace ptx {

// What somebody knows of the time of everybody: of each warp of a cluster, and behind those of its bulk copies.
class Clock {
 public:
  u32 of(u32 agent) const { return agent < times_.size() ? times_[agent] : 0; }
  void set(u32 agent, u32 time) {
    if (agent >= times_.size()) times_.resize(agent + 1);
    times_[agent] = std::max(times_[agent], time);
  }
  void join(const Clock& other) {
    if (other.times_.size() > times_.size()) times_.resize(other.times_.size());
    for (size_t i = 0; i < other.times_.size(); ++i) times_[i] = std::max(times_[i], other.times_[i]);
  }

 private:
  std::vector<u32> times_;
};

// Who accesses memory. Lanes of a warp run in an order of their own only up to the next bar.warp.sync, shuffle or the
// like: to each other they are ordered by the clock of their warp.
struct Agent {
  u32 index;  // of the warp or bulk copy
  int lane;
  u32 time;
  const Clock* knows;

  u32 id() const { return index * kLanes + lane + 1; }
};

// A byte: its last store, and its loads since by two agents at most.
struct Shadow {
  u32 cluster = 0;  // of the agents: clusters run one after the other
  u32 writer = 0, write_time = 0;
  u32 readers[2] = {0, 0}, read_times[2] = {0, 0};

  static u32 index_of(u32 id) { return (id - 1) / kLanes; }

  static bool in_order(const Agent& agent, u32 id, u32 time) {
    return id == agent.id() || time <= agent.knows->of(index_of(id));
  }
  bool store_in_order(const Agent& agent) const { return writer == 0 || in_order(agent, writer, write_time); }
  // The reader that a store of the agent races with, or 0.
  u32 unordered_reader(const Agent& agent) const {
    for (int i = 0; i < 2; ++i)
      if (readers[i] && !in_order(agent, readers[i], read_times[i])) return readers[i];
    return 0;
  }

  void stored(const Agent& agent) {
    writer = agent.id(), write_time = agent.time;
    readers[0] = readers[1] = 0;
  }
  // Of two agents, those of different warps are kept: whoever stores, one of them is another warp.
  void loaded(const Agent& agent) {
    const u32 id = agent.id();
    const bool same_warp = readers[0] && index_of(readers[0]) == agent.index;
    const bool into_second = same_warp && readers[0] != id && readers[1] == 0;
    if (into_second) {
      readers[1] = id, read_times[1] = agent.time;
      return;
    }
    if (readers[0] && !same_warp) readers[1] = readers[0], read_times[1] = read_times[0];
    readers[0] = id, read_times[0] = agent.time;
  }
};

}  // namespace ptx
