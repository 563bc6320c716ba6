// Barriers in shared memory that count bytes (mbarrier), and the bulk copies that they count.
#include <cstring>

#include "machine.h"

namespace ptx {

u64 Machine::mbarrier_address(const Warp& w, const Instruction& i, int lane) const {
  return (u32)(value(w, i.base)[lane] + i.offset);
}

Mbarrier& Machine::mbarrier(const Warp& w, u64 address, int lane) {
  const auto found = mbarriers_.find((u64)w.block << 32 | address);
  if (found == mbarriers_.end()) fail("no mbarrier is there", lane);
  return found->second;
}

void Machine::init_mbarrier(Warp& w, const Instruction& i, u32 mask) {
  each(mask, [&](int lane) {
    const u64 address = mbarrier_address(w, i, lane);
    const Place p = place(w, Space::kShared, address, 8, true, lane);
    const u64 opaque = ~(u64)address;
    touch(w, p, 8, lane, (const u8*)&opaque);
    memcpy(p.data, &opaque, 8);
    const s64 count = (u32)operand(w, i, 0)[lane];
    const auto [b, is_new] = mbarriers_.try_emplace((u64)w.block << 32 | address);
    if (is_new) b->second.copier = (u32)(warps_.size() + mbarriers_.size() - 1);
    b->second.count = b->second.pending = count, b->second.bytes = 0, b->second.phase = 0;
  });
}

void Machine::end_phase(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase, b.pending = b.count;
  progress_ = true;
}

// Sees that somebody had initialised it before: uses of an mbarrier do not race with each other.
void Machine::expect(Warp& w, const Instruction& i, u32 mask) {
  each(mask, [&](int lane) {
    const u64 address = mbarrier_address(w, i, lane);
    touch(w, place(w, Space::kShared, address, 8, false, lane), 8, lane, nullptr);
    Mbarrier& b = mbarrier(w, address, lane);
    b.bytes += (u32)operand(w, i, 0)[lane];
    if (--b.pending < 0) fail("more arrivals at an mbarrier than it counts", lane);
    b.released.join(w.clock);  // what this lane alone has done since is not covered: the others of its warp may run on
    end_phase(b);
  });
}

void Machine::bulk_copy(Warp& w, const Instruction& i, u32 mask) {
  each(mask, [&](int lane) {
    const u64 to = (u32)operand(w, i, 0)[lane], from = operand(w, i, 1)[lane], bar = (u32)operand(w, i, 3)[lane];
    const u32 bytes = (u32)operand(w, i, 2)[lane];
    if (to % 16 || from % 16 || bytes % 16 || !bytes) fail("a bulk copy that is not of multiples of 16 bytes", lane);
    Mbarrier& counter = mbarrier(w, bar, lane);
    const Agent copier = {counter.copier, 0, ++counter.copies, &w.clock};
    for (u32 at = 0; at < bytes; at += 16) {
      const Place source = place(w, Space::kGlobal, from + at, 16, false, lane);
      const Place target = place(w, Space::kShared, to + at, 16, true, lane);
      touch(w, source, 16, lane, nullptr);
      source.region->loaded[(from + at) / 32 - source.region->begin / 32] = 1;
      memset(target.written, 1, 16);
      for (u32 n = 0; n < 16 && target.shadow; ++n) {
        Shadow& s = target.shadow[n];
        const Agent me = agent(w, lane);
        if (!s.store_in_order(me)) report(kPtxRaces, "a bulk copy races with a store of " + name_of(s.writer), lane);
        if (const u32 reader = s.unordered_reader(me))
          report(kPtxRaces, "a bulk copy races with a load of " + name_of(reader), lane);
        s.cluster = cluster_;
        s.stored(copier);
      }
    }
    counters_[kPtxBulkBytes] += bytes;
    const Copy copy = {to, from, bytes, w.block, (u64)w.block << 32 | bar, copier.index, copier.time};
    if (!options_.late_copies) return complete(copy);
    memset(&blocks_[w.block].shared[to], 0xff, bytes);  // NaN until it has arrived
    copies_.push_back(copy);
  });
}

void Machine::complete(const Copy& copy) {
  memcpy(&blocks_[copy.block].shared[copy.to], (const void*)copy.from, copy.bytes);
  Mbarrier& b = mbarriers_.at(copy.mbarrier);
  b.bytes -= copy.bytes;
  b.released.set(copy.agent, copy.time);
  end_phase(b);
}

// Whether the phase is over for all lanes. The first to wait for late copies finds that they have not arrived yet.
bool Machine::try_wait(Warp& w, const Instruction& i, u32 mask) {
  const u64* parity = operand(w, i, 0);
  u32 over = 0;
  each(mask, [&](int lane) {
    const u64 address = mbarrier_address(w, i, lane);
    touch(w, place(w, Space::kShared, address, 8, false, lane), 8, lane, nullptr);
    Mbarrier& b = mbarrier(w, address, lane);
    if ((b.phase & 1) != ((u32)parity[lane] & 1)) {
      over |= 1u << lane;
      w.clock.join(b.released);
      return;
    }
    std::vector<Copy> others;
    for (const Copy& copy : copies_)
      if (copy.mbarrier == ((u64)w.block << 32 | address))
        complete(copy);
      else
        others.push_back(copy);
    copies_ = others;
  });
  set_predicate(w, i.predicate, mask, over);
  return over == mask;
}

}  // namespace ptx
