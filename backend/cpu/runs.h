// Tasks for threads, of which each goes through a run of neighbours in order: then what it reads from memory is one stream.

#pragma once
#include <stdint.h>

#include <atomic>

namespace {

// Made outside of a parallel region, in which every thread calls each().
class Runs {
  static constexpr int MOST = 64;
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  } runs[MOST];
  std::atomic<int> joined{0};
  int count;

 public:
  Runs(int64_t tasks, int threads) : count(threads < 1 ? 1 : threads < MOST ? threads : MOST) {
    for (int i = 0; i < count; i++) runs[i].next = tasks * i / count, runs[i].end = tasks * (i + 1) / count;
  }

  // todo(task) for every task of a run of its own, and then of those that other threads have not come to.
  template <class Do>
  void each(Do todo) {
    const int own = joined++ % count;
    for (int i = 0; i < count; i++) {
      Run& run = runs[(own + i) % count];
      for (int64_t task; (task = run.next++) < run.end;) todo(task);
    }
  }
};

}  // namespace
