// Words and n-grams to numbers: open addressing, where a key is compared before it is believed.
#include <cstring>

#include "../common/check.h"
#include "cider_d.h"

namespace fastcap {
namespace {

constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;

inline uint64_t mix(uint64_t x) {
  x *= kOdd;
  return x ^ (x >> 32);
}

inline uint64_t hash_of(const char* data, size_t length) {
  uint64_t found = length;
  for (; length >= 8; data += 8, length -= 8) {
    uint64_t part;
    std::memcpy(&part, data, 8);
    found = mix(found ^ part);
  }
  uint64_t part = 0;
  std::memcpy(&part, data, length);
  return mix(found ^ part) | 1;  // not 0: a caption of zeros would find every free slot
}

}  // namespace

uint32_t CiderWords::find(const char* data, size_t length, uint64_t hash) const {
  if (below_) {
    const uint32_t id = below_->find(data, length, hash);
    if (id != kNone) return id;
  }
  if (slots_.empty()) return kNone;
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash & mask;; i = (i + 1) & mask) {
    const Slot& slot = slots_[i];
    if (slot.id == kNone) return kNone;
    if (slot.hash != hash) continue;
    const int64_t begin = slot.id == 0 ? 0 : ends_[slot.id - 1], end = ends_[slot.id];
    if (static_cast<size_t>(end - begin) == length && std::memcmp(text_.data() + begin, data, length) == 0)
      return first_ + slot.id;
  }
}

uint32_t CiderWords::add(const char* data, size_t length) {
  const uint64_t hash = hash_of(data, length);
  const uint32_t known = find(data, length, hash);
  if (known != kNone) return known;
  if (size() >= kNone - 1) bad("rewards.CiderD", "captions", "have fewer than 2^32 different words", size(), "score fewer");
  if (2 * (ends_.size() + 1) > slots_.size()) grow();
  const auto id = static_cast<uint32_t>(ends_.size());
  text_.append(data, length);
  ends_.push_back(static_cast<int64_t>(text_.size()));
  const size_t mask = slots_.size() - 1;
  size_t i = hash & mask;
  while (slots_[i].id != kNone) i = (i + 1) & mask;
  slots_[i] = {hash, id};
  return first_ + id;
}

void CiderWords::grow() {
  std::vector<Slot> before(std::max<size_t>(64, 2 * slots_.size()));
  before.swap(slots_);
  const size_t mask = slots_.size() - 1;
  for (const Slot& slot : before) {
    if (slot.id == kNone) continue;
    size_t i = slot.hash & mask;
    while (slots_[i].id != kNone) i = (i + 1) & mask;
    slots_[i] = slot;
  }
}

uint32_t CiderGrams::find(uint32_t before, uint32_t word) const {
  if (slots_.empty()) return kNone;
  const uint64_t key = static_cast<uint64_t>(before) << 32 | word;
  const size_t mask = slots_.size() - 1;
  for (size_t i = mix(key) & mask;; i = (i + 1) & mask)
    if (slots_[i].id == kNone || slots_[i].key == key) return slots_[i].id;
}

uint32_t CiderGrams::add(uint32_t before, uint32_t word, uint32_t id) {
  if (2 * (used_ + 1) > slots_.size()) resize(std::max<size_t>(64, 2 * slots_.size()));
  const uint64_t key = static_cast<uint64_t>(before) << 32 | word;
  const size_t mask = slots_.size() - 1;
  for (size_t i = mix(key) & mask;; i = (i + 1) & mask) {
    if (slots_[i].id == kNone) {
      slots_[i] = {key, id};
      ++used_;
      return id;
    }
    if (slots_[i].key == key) return slots_[i].id;
  }
}

void CiderGrams::clear() {
  if (used_ == 0) return;
  std::fill(slots_.begin(), slots_.end(), Slot{});
  used_ = 0;
}

void CiderGrams::resize(size_t slots) {
  std::vector<Slot> before(slots);
  before.swap(slots_);
  const size_t mask = slots_.size() - 1;
  for (const Slot& slot : before) {
    if (slot.id == kNone) continue;
    size_t i = mix(slot.key) & mask;
    while (slots_[i].id != kNone) i = (i + 1) & mask;
    slots_[i] = slot;
  }
}

}  // namespace fastcap
