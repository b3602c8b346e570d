// Work in equal shares to threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace fdfast {

// body(begin, end) for `threads` shares of [0, count), the first of them on the caller's thread.
template <typename Body>
void for_shares(int64_t count, int threads, const Body& body) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  std::vector<std::thread> pool;
  for (int64_t w = 1; w < workers; ++w) pool.emplace_back(body, count * w / workers, count * (w + 1) / workers);
  body(0, count / workers);
  for (auto& thread : pool) thread.join();
}

}  // namespace fdfast
