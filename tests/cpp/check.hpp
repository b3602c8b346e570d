// Checks for the C++ tests: a failed one says where and what, and the run ends with its count.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>

namespace checks {

inline std::atomic<int> passed{0}, failed{0};

inline void record(bool holds, const char* claim, const char* file, int line, const std::string& seen) {
  if (holds) {
    ++passed;
    return;
  }
  ++failed;
  std::fprintf(stderr, "%s:%d: not so: %s (%s)\n", file, line, claim, seen.c_str());
}

inline int result(const char* suite) {
  std::printf("%s: %d passed, %d failed\n", suite, passed.load(), failed.load());
  return failed ? 1 : 0;
}

}  // namespace checks

#define CHECK(claim) checks::record((claim), #claim, __FILE__, __LINE__, "")
// With what is worth seeing where it fails.
#define CHECK_SEEING(claim, seen) checks::record((claim), #claim, __FILE__, __LINE__, (seen))
