// Threads and pages.
#pragma once
#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcap {

// fn(begin, end) over [0, n) in pieces of `grain`, on at most `threads` threads. Pieces are fixed by n and grain, never by
// the number of threads, so a result that is reduced per piece does not depend on it. fn must not throw.
template <typename Fn>
inline void parallel_for(int64_t n, int64_t grain, int threads, const Fn& fn) {
  const int64_t pieces = (n + grain - 1) / grain;
  const int used = static_cast<int>(std::min<int64_t>(std::max(threads, 1), pieces));
  (void)used;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(used) if (used > 1)
#endif
  for (int64_t i = 0; i < pieces; ++i) fn(i * grain, std::min(n, (i + 1) * grain));
}

constexpr int64_t kHugePage = 2 << 20;

// A fresh gradient of the size of the logits is all page faults: 19,000 of 4 KiB for BLIP, more costly than the writing.
// Asking for 2 MiB pages first makes the same fill about five times faster. Advice only: ignored where not supported.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 4096;
  if (bytes < 2 * kHugePage) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// fn(begin, end) over the n elements at `data` in pieces that end where 2 MiB pages do, so that no two threads wait for the
// same page fault; memory too small for that is cut into 64 KiB.
template <typename T, typename Fn>
inline void parallel_for_pages(const T* data, int64_t n, int threads, const Fn& fn) {
  const int64_t page = n * static_cast<int64_t>(sizeof(T)) < 2 * kHugePage ? 1 << 16 : kHugePage;
  const int64_t length = page / sizeof(T);
  const int64_t offset = reinterpret_cast<uintptr_t>(data) % page / sizeof(T);
  parallel_for(n + offset, length, threads, [&](int64_t begin, int64_t end) {
    begin = std::max<int64_t>(begin - offset, 0);
    if (end - offset > begin) fn(begin, end - offset);
  });
}

}  // namespace fastcap
