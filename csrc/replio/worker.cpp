// Reading from and writing to one worker; see worker.hpp.
#include "worker.hpp"

#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

namespace fdfast::replio {

bool Worker::write_flights() {
  constexpr int kMostPieces = 48;
  while (written < queued_end) {
    iovec pieces[kMostPieces];
    int count = 0;
    for (const Flight& flight : flights) {
      if (flight.end <= written) continue;
      uint64_t skip = written > flight.begin ? written - flight.begin : 0;
      for (const std::string_view text : {std::string_view(flight.prefix), flight.body, flight.suffix}) {
        const uint64_t skipped = std::min<uint64_t>(skip, text.size());
        skip -= skipped;
        if (skipped < text.size()) pieces[count++] = {const_cast<char*>(text.data() + skipped), text.size() - skipped};
      }
      if (count > kMostPieces - 3) break;
    }
    const ssize_t done = writev(child.in.get(), pieces, count);
    if (done >= 0) {
      written += static_cast<uint64_t>(done);
    } else if (errno == EAGAIN) {
      return true;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

uint64_t Worker::consumed() const {
  int unread = 0;
  if (!child.in || ioctl(child.in.get(), FIONREAD, &unread) != 0) unread = 0;
  return written - std::min<uint64_t>(written, static_cast<uint64_t>(unread));
}

bool Worker::read_errors(size_t tail_bytes) {
  char chunk[16 << 10];
  for (int round = 0; round < 16; ++round) {  // others must have their turn beside a flood
    const ssize_t count = read(child.errors.get(), chunk, sizeof chunk);
    if (count < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN;
    }
    if (count == 0) return false;
    errors.append(chunk, static_cast<size_t>(count));
    // Cut in large steps, so that a flood costs one move a byte.
    if (errors.size() > 2 * tail_bytes + sizeof chunk) errors.erase(0, errors.size() - tail_bytes);
    if (static_cast<size_t>(count) < sizeof chunk) break;
  }
  return true;
}

Worker::Read Worker::read_out(size_t limit_bytes) {
  char* const room = out.room();
  const size_t bytes = std::min(out.room_bytes(), limit_bytes);
  while (true) {
    const ssize_t count = read(child.out.get(), room, bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno == EAGAIN ? Read::empty : Read::end;
    if (count == 0) return Read::end;
    out.filled(static_cast<size_t>(count));
    return static_cast<size_t>(count) == bytes ? Read::more : Read::empty;
  }
}

}  // namespace fdfast::replio
