// Counting, weighing and comparing. What costs is finding n-grams: 4 for each word, each a miss of the cache in a table of
// all n-grams. So threads take shards of it, by the first word; all else is per caption.
#include <algorithm>
#include <cmath>
#include <exception>
#include <mutex>

#include "../common/check.h"
#include "../common/parallel.h"
#include "cider_d.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "rewards.CiderD";
constexpr int64_t kGrain = 64;       // captions at a time
constexpr int64_t kAlone = 1 << 12;  // words below which threads cost more than they bring

int threads_for(const CiderText& text, int threads) {
  return static_cast<int64_t>(text.words.size()) < kAlone ? 1 : threads;
}

// parallel_for, of which no exception may leave, for functions that allocate.
template <typename Fn>
void parallel_or_throw(int64_t n, int64_t grain, int threads, const Fn& fn) {
  std::exception_ptr failed;
  std::mutex lock;
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    try {
      fn(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> held(lock);
      failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

inline int shard_of(uint32_t word) { return static_cast<int>(word & (CiderD::kShards - 1)); }
inline uint32_t numbered(uint32_t local, int shard) { return local << CiderD::kShardBits | static_cast<uint32_t>(shard); }

void check_room(size_t local) {
  if (local >= CiderD::kMostInShard)
    bad(kOp, "captions", "have fewer than 2^28 different n-grams after a word", local, "score them in parts");
}

// Where captions begin n-grams, in shards by the first word: of each word of the text its place and its caption.
struct Starts {
  struct Start {
    uint32_t word;
    uint32_t caption;
  };
  std::vector<Start> starts;
  std::vector<int64_t> begin = std::vector<int64_t>(CiderD::kShards + 1);

  explicit Starts(const CiderText& text) : starts(text.words.size()) {
    if (text.words.size() >= kNone || text.captions() >= static_cast<int64_t>(kNone))
      bad(kOp, "captions", "have fewer than 2^32 words in all", text.words.size(), "score them in parts");
    for (uint32_t word : text.words) ++begin[shard_of(word) + 1];
    for (int s = 0; s < CiderD::kShards; ++s) begin[s + 1] += begin[s];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t c = 0; c < text.captions(); ++c)
      for (int64_t w = text.begin[c]; w < text.begin[c + 1]; ++w)
        starts[next[shard_of(text.words[w])]++] = {static_cast<uint32_t>(w), static_cast<uint32_t>(c)};
  }
};

// Finds the n-grams that begin at the words of a shard: find(before, word) numbers them in that shard, seen(number, caption)
// is told of each. ids [words, n] of all of them, as `numbered`. A look into a large table is a miss of the cache; those of
// one n-gram wait for each other, those of a batch of starts do not, so the orders are the outer loop.
template <typename Find, typename Seen>
void walk(const CiderText& text, const Starts& starts, int shard, int n, uint32_t* ids, const Find& find, const Seen& seen) {
  constexpr int64_t kBatch = 64;
  uint32_t before[kBatch];
  for (int64_t first = starts.begin[shard]; first < starts.begin[shard + 1]; first += kBatch) {
    const int64_t count = std::min(kBatch, starts.begin[shard + 1] - first);
    std::fill(before, before + count, CiderGrams::kRoot);
    for (int k = 0; k < n; ++k) {
      for (int64_t i = 0; i < count; ++i) {
        const auto [word, caption] = starts.starts[first + i];
        const int64_t w = static_cast<int64_t>(word) + k;
        if (w >= text.begin[caption + 1]) continue;
        before[i] = find(before[i], text.words[w]);
        seen(before[i], caption);
        ids[static_cast<int64_t>(word) * n + k] = numbered(before[i], shard);
      }
    }
  }
}

std::vector<uint32_t> document_of(const CiderText& text) {
  std::vector<uint32_t> found(text.captions());
  for (int64_t g = 0; g < text.groups(); ++g) std::fill(&found[0] + text.group[g], &found[0] + text.group[g + 1], g);
  return found;
}

}  // namespace

// The different n-grams of one caption in the order in which they come, and a small table to find them in.
struct CiderD::Bag {
  std::vector<CiderEntry> entries;
  std::vector<double> idf;
  double norms[kMostOrders];
  int64_t pairs = 0;

  void start(int64_t words, int n) {
    size_t wanted = 64;
    while (wanted < 2 * static_cast<size_t>(words) * n) wanted *= 2;
    if (slots_.size() < wanted) slots_.assign(wanted, {0, 0, 0});
    mask_ = wanted - 1;
    if (++stamp_ == 0) {  // once in 2^32 captions
      std::fill(slots_.begin(), slots_.end(), Slot{});
      stamp_ = 1;
    }
    entries.clear();
    pairs = n < 2 ? 0 : std::max<int64_t>(0, words - 1);  // counted as n-grams of two words, of which there are then none
  }
  void add(uint32_t gram, int order) {
    Slot& slot = slots_[place(gram)];
    if (slot.stamp == stamp_) {
      entries[slot.entry].times_order += 1u << kOrderBits;
      return;
    }
    slot = {gram, static_cast<uint32_t>(entries.size()), stamp_};
    entries.push_back({gram, 1u << kOrderBits | static_cast<uint32_t>(order)});
  }
  uint32_t find(uint32_t gram) const {
    const Slot& slot = slots_[place(gram)];
    return slot.stamp == stamp_ ? slot.entry : kNone;
  }

 private:
  struct Slot {
    uint32_t gram = 0, entry = 0, stamp = 0;
  };
  size_t place(uint32_t gram) const {
    size_t i = gram * 0x9e3779b9u >> 7 & mask_;
    while (slots_[i].stamp == stamp_ && slots_[i].gram != gram) i = (i + 1) & mask_;
    return i;
  }
  std::vector<Slot> slots_;
  size_t mask_ = 0;
  uint32_t stamp_ = 0;
};

CiderD::CiderD(std::shared_ptr<CiderWords> words, const CiderText& documents, int n, double sigma, int threads)
    : words_(std::move(words)), documents_(documents.groups()), n_(n), sigma_(sigma), log_n_(std::log(documents_)) {
  threads = threads_for(documents, threads);
  const Starts starts(documents);
  const std::vector<uint32_t> document = document_of(documents);
  const std::unique_ptr<uint32_t[]> ids(new uint32_t[documents.words.size() * n]);
  parallel_or_throw(kShards, 1, threads, [&](int64_t begin, int64_t end) {
    for (auto s = static_cast<int>(begin); s < end; ++s) {
      Shard& shard = shards_[s];
      std::vector<uint32_t> last;  // document in which each was seen
      const auto find = [&](uint32_t before, uint32_t word) {
        const auto next = static_cast<uint32_t>(shard.parent.size());
        const uint32_t id = shard.grams.add(before, word, next);
        if (id == next) {
          check_room(next);
          shard.parent.push_back(before);
          shard.word.push_back(word);
          shard.df.push_back(0);
          last.push_back(kNone);
        }
        return id;
      };
      walk(documents, starts, s, n_, ids.get(), find, [&](uint32_t id, uint32_t caption) {
        shard.df[id] += last[id] != document[caption];
        last[id] = document[caption];
      });
      weigh(s);
    }
  });
  own_ = std::make_shared<CiderReferences>();
  own_->words = words_;
  for (const Shard& shard : shards_) own_->sizes.push_back(static_cast<uint32_t>(shard.parent.size()));
  own_->group = documents.group;
  own_->vectors = vectors(documents, ids.get(), threads);
}

CiderD::CiderD(std::shared_ptr<CiderWords> words, const int64_t* parent, const int64_t* word, const int64_t* count,
               int64_t grams, int64_t documents, int n, double sigma)
    : words_(std::move(words)), documents_(documents), n_(n), sigma_(sigma), log_n_(std::log(documents)) {
  std::vector<uint32_t> number(grams);
  for (int64_t i = 0; i < grams; ++i) {
    const auto last = static_cast<uint32_t>(word[i]);
    const int s = parent[i] < 0 ? shard_of(last) : shard_of(number[parent[i]]);
    const uint32_t before = parent[i] < 0 ? CiderGrams::kRoot : number[parent[i]] >> kShardBits;
    Shard& shard = shards_[s];
    const auto next = static_cast<uint32_t>(shard.parent.size());
    check_room(next);
    if (shard.grams.add(before, last, next) != next)
      bad(kOp, "path", "hold each n-gram once", "one twice", "pass a file that CiderD.save wrote");
    shard.parent.push_back(before);
    shard.word.push_back(last);
    shard.df.push_back(static_cast<uint32_t>(count[i]));
    number[i] = numbered(next, s);
  }
  for (int s = 0; s < kShards; ++s) weigh(s);
}

void CiderD::weigh(int s) {
  Shard& shard = shards_[s];
  shard.idf.resize(shard.df.size());
  for (size_t i = 0; i < shard.df.size(); ++i) shard.idf[i] = log_n_ - std::log(std::max(1u, shard.df[i]));
}

inline double CiderD::idf(uint32_t gram) const {
  const Shard& shard = shards_[shard_of(gram)];
  const uint32_t local = gram >> kShardBits;
  return local < shard.idf.size() ? shard.idf[local] : log_n_;  // in no document
}

std::shared_ptr<CiderReferences> CiderD::prepare(std::shared_ptr<const CiderWords> words, const CiderText& text,
                                                 int threads) const {
  threads = threads_for(text, threads);
  auto made = std::make_shared<CiderReferences>();
  made->words = std::move(words);
  made->own.resize(kShards);
  made->sizes.resize(kShards);
  made->group = text.group;
  const Starts starts(text);
  const std::unique_ptr<uint32_t[]> ids(new uint32_t[text.words.size() * n_]);
  parallel_or_throw(kShards, 1, threads, [&](int64_t begin, int64_t end) {
    for (auto s = static_cast<int>(begin); s < end; ++s) {
      const Shard& shard = shards_[s];
      CiderGrams& own = made->own[s];
      const auto known = static_cast<uint32_t>(shard.parent.size());
      const auto find = [&](uint32_t before, uint32_t word) {
        const uint32_t id = before == CiderGrams::kRoot || before < known ? shard.grams.find(before, word) : kNone;
        if (id != kNone) return id;
        const auto next = static_cast<uint32_t>(known + own.size());
        check_room(next);
        return own.add(before, word, next);
      };
      walk(text, starts, s, n_, ids.get(), find, [](uint32_t, uint32_t) {});
      made->sizes[s] = static_cast<uint32_t>(known + own.size());
    }
  });
  made->vectors = vectors(text, ids.get(), threads);
  return made;
}

CiderVectors CiderD::vectors(const CiderText& text, const uint32_t* ids, int threads) const {
  const int64_t C = text.captions();
  CiderVectors made;
  made.entries.reset(new CiderEntry[text.words.size() * n_]);
  made.begin.resize(C);
  made.count.resize(C);
  made.norms.resize(C * n_);
  made.pairs.resize(C);
  parallel_or_throw(C, kGrain, threads, [&](int64_t begin, int64_t end) {
    Bag bag;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = text.begin[c], last = text.begin[c + 1];
      bag.start(last - first, n_);
      for (int64_t w = first; w < last; ++w)
        for (int k = 0; k < n_ && w + k < last; ++k) bag.add(ids[w * n_ + k], k);
      made.begin[c] = first * n_;
      made.count[c] = static_cast<uint32_t>(bag.entries.size());
      std::copy(bag.entries.begin(), bag.entries.end(), &made.entries[first * n_]);
      bag.idf.clear();
      for (const CiderEntry& entry : bag.entries) bag.idf.push_back(idf(entry.gram));
      norms(bag, &made.norms[c * n_]);
      made.pairs[c] = bag.pairs;
    }
  });
  return made;
}

void CiderD::norms(const Bag& bag, double* out) const {
  std::fill(out, out + n_, 0.0);
  for (size_t i = 0; i < bag.entries.size(); ++i) {
    const uint32_t packed = bag.entries[i].times_order;
    const double weight = (packed >> kOrderBits) * bag.idf[i];
    out[packed & (kMostOrders - 1)] += weight * weight;
  }
  for (int k = 0; k < n_; ++k) out[k] = std::sqrt(out[k]);
}

// kNone where neither the documents nor the references have it.
inline uint32_t CiderD::find(uint32_t before, uint32_t word, int s, const CiderReferences& references) const {
  const bool root = before == CiderGrams::kRoot;
  uint32_t id = kNone;
  if (root || before < shards_[s].parent.size()) id = shards_[s].grams.find(before, word);
  if (id == kNone && !references.own.empty() && (root || before < references.sizes[s]))
    id = references.own[s].find(before, word);
  return id;
}

void CiderD::score(const CiderText& candidates, const CiderReferences& references, const int64_t* rows, double* out,
                   int threads) const {
  parallel_or_throw(candidates.captions(), kGrain, threads_for(candidates, threads), [&](int64_t begin, int64_t end) {
    Bag bag;
    CiderGrams unknown;  // of one candidate
    std::vector<uint32_t> before;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = candidates.begin[c], last = candidates.begin[c + 1];
      bag.start(last - first, n_);
      unknown.clear();
      before.assign(last - first, CiderGrams::kRoot);
      for (int k = 0; k < n_; ++k) {
        for (int64_t w = first; w + k < last; ++w) {
          const int s = shard_of(candidates.words[w]);
          const uint32_t shorter = before[w - first], word = candidates.words[w + k];
          uint32_t id = find(shorter, word, s, references);
          if (id == kNone) {
            const size_t next = references.sizes[s] + unknown.size();
            check_room(next);
            // the root of all shards is one, for there the word tells the shard
            const uint32_t key = k == 0 ? CiderGrams::kRoot : numbered(shorter, s);
            id = unknown.add(key, word, static_cast<uint32_t>(next));
          }
          before[w - first] = id;
          bag.add(numbered(id, s), k);
        }
      }
      bag.idf.clear();
      for (const CiderEntry& entry : bag.entries) bag.idf.push_back(idf(entry.gram));
      norms(bag, bag.norms);
      compare(bag, references, rows[c], &out[c]);
    }
  });
}

void CiderD::compare(const Bag& bag, const CiderReferences& references, int64_t group, double* out) const {
  const CiderVectors& vectors = references.vectors;
  const int64_t first = references.group[group], last = references.group[group + 1];
  double total = 0;
  for (int64_t r = first; r < last; ++r) {
    double shared[kMostOrders] = {};
    const CiderEntry* entries = &vectors.entries[vectors.begin[r]];
    for (uint32_t i = 0; i < vectors.count[r]; ++i) {
      const uint32_t mine = bag.find(entries[i].gram);
      if (mine == kNone) continue;
      const double idf = bag.idf[mine];
      const double theirs = (entries[i].times_order >> kOrderBits) * idf;
      const double own = (bag.entries[mine].times_order >> kOrderBits) * idf;
      shared[entries[i].times_order & (kMostOrders - 1)] += std::min(own, theirs) * theirs;
    }
    double similarity = 0;
    for (int k = 0; k < n_; ++k) {
      const double norm = bag.norms[k] * vectors.norms[r * n_ + k];
      if (norm > 0) similarity += shared[k] / norm;
    }
    const auto delta = static_cast<double>(bag.pairs - vectors.pairs[r]);
    total += similarity / n_ * std::exp(-delta * delta / (2 * sigma_ * sigma_));
  }
  *out = 10 * total / static_cast<double>(last - first);
}

int64_t CiderD::grams() const {
  int64_t found = 0;
  for (const Shard& shard : shards_) found += static_cast<int64_t>(shard.parent.size());
  return found;
}

void CiderD::table(int64_t* parent, int64_t* word, int64_t* count) const {
  int64_t first = 0;
  for (const Shard& shard : shards_) {
    const auto size = static_cast<int64_t>(shard.parent.size());
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t before = shard.parent[i];
      parent[first + i] = before == CiderGrams::kRoot ? -1 : first + before;
      word[first + i] = shard.word[i];
      count[first + i] = shard.df[i];
    }
    first += size;
  }
}

}  // namespace fastcap
