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

// A fresh gradient of the size of the logits is all page faults: 19,000 of 4 KiB for BLIP, more costly than the writing.
// Asking for 2 MiB pages first makes the same fill about five times faster. Advice only: ignored where not supported.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 4096, kWorthIt = 4 << 20;
  if (bytes < kWorthIt) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fastcap
