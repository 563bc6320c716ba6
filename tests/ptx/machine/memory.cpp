// Loads, stores and atomic operations: bounds, alignment, initialisation, races; and how memory is accessed.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace ptx {

using std::string;

constexpr u64 kSector = 32;

Region::Region(u64 begin_, u64 bytes, u8* written_)
    : begin(begin_),
      end(begin_ + bytes),
      written(written_),
      loaded((end + kSector - 1) / kSector - begin / kSector),
      stored(loaded.size()),
      shadows_((end + kChunk - 1) / kChunk - begin / kChunk) {}

Shadow* Region::shadow(u64 address) {
  std::unique_ptr<Shadow[]>& chunk = shadows_[address / kChunk - begin / kChunk];
  if (!chunk) chunk.reset(new Shadow[kChunk]());
  return &chunk[address % kChunk];
}

// ------------------------------------------------------------------------------------------------------------
// addresses

Region* Machine::region_at(u64 address) {
  if (last_region_ && address >= last_region_->begin && address < last_region_->end) return last_region_;
  auto next = std::upper_bound(regions_.begin(), regions_.end(), address,
                               [](u64 a, const Region& region) { return a < region.begin; });
  if (next == regions_.begin()) return nullptr;
  Region& region = *--next;
  return address < region.end ? last_region_ = &region : nullptr;
}

void Machine::out_of_bounds(u64 address, u32 bytes, bool store, int lane) const {
  string near;
  constexpr u64 kNear = 1 << 16;
  for (const Region& r : regions_)
    if (address + kNear > r.begin && address < r.end + kNear)
      near = ", " + std::to_string((s64)(address - r.end)) + " bytes behind the end of an array of " +
             std::to_string(r.end - r.begin) + " bytes";
  fail(string(store ? "store" : "load") + " of " + std::to_string(bytes) + " bytes out of bounds" + near, lane);
}

Place Machine::place(const Warp& w, Space space, u64 address, u32 bytes, bool store, int lane) {
  u32 rank = w.block;
  if (space == Space::kGeneric) {
    const u64 window = address & kWindow;
    space = window == kSharedWindow ? Space::kShared : window == kParamWindow ? Space::kParam : Space::kGlobal;
    if (space == Space::kShared) rank = address >> 32 & 0xffffff;
  }
  if (space != Space::kGlobal) address = (u32)address;
  if (space == Space::kCluster) {
    if (address >> kClusterShift) rank = (u32)(address >> kClusterShift) - 1;
    address &= low_bits(kClusterShift), space = Space::kShared;
  }
  if (address % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes", lane);
  if (space == Space::kGlobal) {
    Region* region = region_at(address);
    if (!region || address + bytes > region->end) out_of_bounds(address, bytes, store, lane);
    const u64 offset = address - region->begin;
    return {(u8*)address,
            region->written ? region->written + offset : nullptr,
            options_.races ? region->shadow(address) : nullptr,
            region,
            nullptr,
            offset};
  }
  if (space == Space::kParam) {
    if (store || address + bytes > (u64)kernel_.parameter_bytes) fail("access beyond the parameters", lane);
    return {const_cast<u8*>(launch_.parameters) + address, nullptr, nullptr, nullptr, nullptr, address};
  }
  if (rank >= blocks_.size()) fail("shared memory of a block that is not in the cluster", lane);
  Block& block = blocks_[rank];
  if (address + bytes > block.shared.size())
    fail(string(store ? "store" : "load") + " of " + std::to_string(bytes) + " bytes out of bounds: at " +
             std::to_string(address) + " of " + std::to_string(block.shared.size()) + " bytes of shared memory",
         lane);
  return {&block.shared[address],
          &block.written[address],
          block.shadow.empty() ? nullptr : &block.shadow[address],
          nullptr,
          &block,
          address};
}

void Machine::places(const Warp& w, const Instruction& i, u32 mask, bool store, Place* places) {
  const u64* base = value(w, i.base);
  const u32 bytes = bytes_of(i.type) * i.vector;
  each(mask, [&](int lane) { places[lane] = place(w, i.space, base[lane] + i.offset, bytes, store, lane); });
}

// ---------------------------------------------------------------------------------------------------------------
// checks

// Of an access by a lane. A store of the value that is there already, as of several threads that hold the same element,
// changes nothing and races with nothing.
void Machine::touch(const Warp& w, const Place& p, u32 bytes, int lane, const u8* stored) {
  if (p.written) {
    if (stored)
      memset(p.written, 1, bytes);
    else if (memchr(p.written, 0, bytes))
      report(kPtxUnwritten, string("load of uninitialised ") + (p.region ? "global" : "shared") + " memory", lane);
  }
  if (!p.shadow) return;
  const Agent me = agent(w, lane);
  for (u32 byte = 0; byte < bytes; ++byte) {
    Shadow& s = p.shadow[byte];
    const bool changes = !stored || p.data[byte] != stored[byte];
    if (s.cluster != cluster_) {
      const bool conflict = (s.writer || (stored && s.readers[0])) && changes;
      if (s.cluster && conflict && !seen_clusters_.count(s.cluster))
        report(kPtxRaces, string(stored ? "store" : "load") + " races with another block", lane);
      s = {}, s.cluster = cluster_;
    }
    if (changes && !s.store_in_order(me))
      report(kPtxRaces, string(stored ? "store" : "load") + " races with a store of " + name_of(s.writer), lane);
    if (stored) {
      if (const u32 reader = changes ? s.unordered_reader(me) : 0)
        report(kPtxRaces, "store races with a load of " + name_of(reader), lane);
      s.stored(me);
    } else {
      s.loaded(me);
    }
  }
}

void Machine::count(u32 mask, const Place* places, u32 bytes, bool store) {
  const Place& first = places[std::countr_zero(mask)];
  if (Region* r = first.region) {
    u64 seen[2 * kLanes];
    int sectors = 0;
    each(mask, [&](int lane) {
      r = places[lane].region;
      const u64 sector = (u64)places[lane].data / kSector;  // no access of up to 32 bytes spans two
      if (sectors && seen[sectors - 1] == sector) return;
      if (std::find(seen, seen + sectors, sector) == seen + sectors) seen[sectors++] = sector;
      (store ? r->stored : r->loaded)[sector - r->begin / kSector] = 1;
    });
    ++counters_[store ? kPtxStoreRequests : kPtxLoadRequests];
    counters_[store ? kPtxStoreBytes : kPtxLoadBytes] += (u64)bytes * std::popcount(mask);
    counters_[store ? kPtxStoreSectors : kPtxLoadSectors] += sectors;
  } else if (first.block) {
    // Passes of up to 128 bytes; in each, a bank serves one word of 4 bytes at a time.
    ++counters_[kPtxSharedRequests];
    const int lanes = bytes <= 4 ? kLanes : 128 / (int)bytes, words_of_lane = std::max<int>(bytes / 4, 1);
    for (int begin = 0; begin < kLanes; begin += lanes) {
      u64 words[kLanes];
      int num_words = 0, load[kLanes] = {}, most = 0;
      each(mask & (u32)(low_bits(lanes) << begin), [&](int lane) {
        for (int n = 0; n < words_of_lane; ++n) {
          const u64 word = (u64)places[lane].data / 4 + n;
          if (std::find(words, words + num_words, word) != words + num_words) continue;
          words[num_words++] = word;
          most = std::max(most, ++load[(places[lane].offset / 4 + n) % kLanes]);
        }
      });
      counters_[kPtxSharedWaves] += most;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// instructions

void Machine::load(Warp& w, const Instruction& i, u32 mask) {
  const u32 bytes = bytes_of(i.type);
  if (i.space == Space::kParam && i.base == kNoOperand) {
    for (int n = 0; n < i.vector; ++n) {
      u64 x = 0;
      memcpy(&x, launch_.parameters + i.offset + n * bytes, bytes);
      u64* to = result(w, i, n);
      each(mask, [&](int lane) { to[lane] = extended(i.type, x); });
    }
    return;
  }
  Place from[kLanes];
  places(w, i, mask, false, from);
  each(mask, [&](int lane) { touch(w, from[lane], bytes * i.vector, lane, nullptr); });
  for (int n = 0; n < i.vector; ++n) {
    u64* to = result(w, i, n);
    each(mask, [&](int lane) {
      u64 x = 0;
      memcpy(&x, from[lane].data + n * bytes, bytes);
      to[lane] = extended(i.type, x);
    });
  }
  count(mask, from, bytes * i.vector, false);
}

void Machine::store(Warp& w, const Instruction& i, u32 mask) {
  const u32 bytes = bytes_of(i.type);
  Place to[kLanes];
  places(w, i, mask, true, to);
  each(mask, [&](int lane) {
    u8 data[32];
    for (int n = 0; n < i.vector; ++n) memcpy(data + n * bytes, &operand(w, i, n)[lane], bytes);
    touch(w, to[lane], bytes * i.vector, lane, data);
    memcpy(to[lane].data, data, bytes * i.vector);
  });
  count(mask, to, bytes * i.vector, true);
}

// What is known of the address becomes known here, and what is known here becomes known there.
void Machine::synchronise(Warp& w, u64 address) {
  Atomic& a = atomics_[address];
  if (a.cluster != cluster_) a.cluster = cluster_, a.clock = {};
  seen_clusters_.insert(a.clusters.begin(), a.clusters.end());
  a.clusters.insert(cluster_);
  tick(w);
  w.clock.join(a.clock);
  a.clock.join(w.clock);
}

void Machine::atomic(Warp& w, const Instruction& i, u32 mask) {
  Place places_[kLanes];
  places(w, i, mask, true, places_);
  const u32 bytes = bytes_of(i.type);
  const u64 *const x = operand(w, i, 0), *const y = i.num_operands > 1 ? operand(w, i, 1) : x;
  u64* const old_values = i.num_results ? result(w, i) : nowhere_;
  each(mask, [&](int lane) {
    const Place& p = places_[lane];
    if (p.written && memchr(p.written, 0, bytes))
      report(kPtxUnwritten, "atomic operation on uninitialised memory", lane);
    synchronise(w, (u64)p.data);
    u64 old = 0;
    memcpy(&old, p.data, bytes);
    const u64 a = extended(i.type, old), b = extended(i.type, x[lane]);
    const bool less = is_signed(i.type) ? (s64)a < (s64)b : a < b;
    u64 now = b;
    switch (i.mode) {
      case Mode::kAdd:
        now = i.type == Type::F32   ? bits(as_f32(a) + as_f32(b))
              : i.type == Type::F64 ? bits(as_f64(a) + as_f64(b))
                                    : a + b;
        break;
      case Mode::kMin:
        now = less ? a : b;
        break;
      case Mode::kMax:
        now = less ? b : a;
        break;
      case Mode::kAnd:
        now = a & b;
        break;
      case Mode::kOr:
        now = a | b;
        break;
      case Mode::kXor:
        now = a ^ b;
        break;
      case Mode::kInc:
        now = a >= b ? 0 : a + 1;
        break;
      case Mode::kCas:
        now = a == b ? y[lane] : a;
        break;
      case Mode::kExch:
        break;
      default:
        unknown();
    }
    memcpy(p.data, &now, bytes);
    old_values[lane] = a;
  });
}

}  // namespace ptx
