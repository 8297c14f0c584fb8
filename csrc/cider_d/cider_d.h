// CIDEr-D of captions against references; fastcap/rewards/cider_d.py has the formulas.
//
//   captions --Words--> numbers --Grams--> numbers of n-grams --weights--> sorted vectors, compared pair by pair
//
// Nothing is told apart by a hash alone. A word is kept as its bytes. An n-gram is its number: n-gram (w_1 .. w_k) is found
// by the exact 64-bit key (number of w_1 .. w_k-1, number of w_k), of 32 bits each, so that two n-grams meet only if they
// are one. Hashes choose where to look, and keys are compared.
//
// Of what is not known yet, each call keeps its own: `Words` and `Grams` stand on others that they only read. So scoring
// changes nothing that another thread sees.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastcap {

constexpr uint32_t kNone = 0xffffffffu;

// Captions of groups (of images), as numbers of words: caption i is words[begin[i]] .. words[begin[i + 1] - 1], group g is
// captions group[g] .. group[g + 1] - 1.
struct CiderText {
  std::vector<uint32_t> words;
  std::vector<int64_t> begin{0}, group{0};
  int64_t captions() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t groups() const { return static_cast<int64_t>(group.size()) - 1; }
};

// Bytes to numbers, counted from 0 on; those below come first.
class CiderWords {
 public:
  explicit CiderWords(std::shared_ptr<const CiderWords> below = nullptr)
      : below_(std::move(below)), first_(below_ ? below_->size() : 0) {}
  uint32_t size() const { return first_ + static_cast<uint32_t>(ends_.size()); }
  int64_t bytes() const { return static_cast<int64_t>(text_.size()); }  // of its own words
  const std::string& text() const { return text_; }
  const std::vector<int64_t>& ends() const { return ends_; }
  uint32_t add(const char* data, size_t length);

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t id = kNone;
  };
  uint32_t find(const char* data, size_t length, uint64_t hash) const;
  void grow();
  std::shared_ptr<const CiderWords> below_;
  uint32_t first_;
  std::string text_;
  std::vector<int64_t> ends_;
  std::vector<Slot> slots_;
};

// (n-gram before, word) to the number of the longer n-gram. `kRoot` stands before the first word.
class CiderGrams {
 public:
  static constexpr uint32_t kRoot = kNone;
  uint32_t find(uint32_t before, uint32_t word) const;
  uint32_t add(uint32_t before, uint32_t word, uint32_t id);  // the number that it has, else id, which it has from now on
  size_t size() const { return used_; }
  void clear();
  void reserve(size_t count);

 private:
  struct Slot {
    uint64_t key = 0;
    uint32_t id = kNone;
  };
  void resize(size_t slots);
  std::vector<Slot> slots_;
  size_t used_ = 0;
};

// An n-gram of a caption: its number, and how often it stands there and how long it is, less one, in 29 and 3 bits.
struct CiderEntry {
  uint32_t gram;
  uint32_t times_order;
};

constexpr int kMostOrders = 8, kOrderBits = 3;

// Captions as their different n-grams, with norms; those of caption i are the count[i] entries from begin[i] on.
struct CiderVectors {
  std::unique_ptr<CiderEntry[]> entries;
  std::vector<int64_t> begin;
  std::vector<uint32_t> count;
  std::vector<double> norms;   // [captions, n]
  std::vector<int64_t> pairs;  // of neighbouring words
};

// References, weighed by a scorer. Of n-grams that no document has there is nothing to know but which are the same.
struct CiderReferences {
  std::shared_ptr<const CiderWords> words;
  std::vector<CiderGrams> own;  // by shard, such n-grams; empty where all are the scorer's
  std::vector<uint32_t> sizes;  // by shard, how many n-grams are the scorer's or of `own`
  std::vector<int64_t> group;
  CiderVectors vectors;
};

class CiderD {
 public:
  // N-grams are kept apart by their first word, so that threads can add to them at once. The number of shards is fixed, and
  // with it every number and every sum: results do not depend on the number of threads.
  static constexpr int kShardBits = 4, kShards = 1 << kShardBits;
  static constexpr uint32_t kMostInShard = (1u << (32 - kShardBits)) - 2;

  // Each group of captions is a document. The words are then `words`' and change no more.
  CiderD(std::shared_ptr<CiderWords> words, const CiderText& documents, int n, double sigma, int threads);
  // N-gram i is n-gram parent[i] (-1: none) with word[i] behind, of count[i] documents; parents come first.
  CiderD(std::shared_ptr<CiderWords> words, const int64_t* parent, const int64_t* word, const int64_t* count, int64_t grams,
         int64_t documents, int n, double sigma);

  const std::shared_ptr<CiderReferences>& own() const { return own_; }  // the documents; null of counts alone
  // words: on top of the scorer's.
  std::shared_ptr<CiderReferences> prepare(std::shared_ptr<const CiderWords> words, const CiderText& text,
                                           int threads) const;
  // out[c] of candidate c against group rows[c]; the candidates' words on top of the references'.
  void score(const CiderText& candidates, const CiderReferences& references, const int64_t* rows, double* out,
             int threads) const;

  int64_t grams() const;
  void table(int64_t* parent, int64_t* word, int64_t* count) const;
  int64_t documents() const { return documents_; }
  const std::shared_ptr<CiderWords>& words() const { return words_; }

 private:
  struct Shard {
    CiderGrams grams;
    std::vector<uint32_t> parent, word, df;
    std::vector<double> idf;
  };
  struct Bag;
  void weigh(int shard);
  double idf(uint32_t gram) const;
  uint32_t find(uint32_t before, uint32_t word, int shard, const CiderReferences& references) const;
  void compare(const Bag& bag, const CiderReferences& references, int64_t group, double* out) const;
  CiderVectors vectors(const CiderText& text, const uint32_t* ids, int threads) const;
  void norms(const Bag& bag, double* out) const;

  std::shared_ptr<CiderWords> words_;
  int64_t documents_;
  int n_;
  double sigma_, log_n_;
  std::vector<Shard> shards_{kShards};
  std::shared_ptr<CiderReferences> own_;
};

}  // namespace fastcap
